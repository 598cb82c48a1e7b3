// The choice of blocks: a few of many scores, which torch's operators do badly.

#include <cstdint>
#include <vector>

#include "vectors.h"

namespace moba {
namespace {

struct Queries {        // up to LANES neighbours
  const float *scores;  // of the first block
  int64_t stride;       // from one block's scores to the next one's
  int64_t count;
  const int64_t *first, *stop;  // blocks that each may choose
};

// The k largest scores of each query and whose they are, largest first; among equal ones the later block wins.
// What is no number, or below the lowest, counts as the lowest.
inline __attribute__((always_inline)) void largest(const Queries &q, int64_t k, Floats *best, Ints *which) {
  Ints from = {}, to = {};
  int64_t begin = q.first[0], end = q.stop[0];
  for (int64_t i = 0; i < q.count; i++) {
    from[i] = static_cast<int32_t>(q.first[i]);
    to[i] = static_cast<int32_t>(q.stop[i]);
    begin = q.first[i] < begin ? q.first[i] : begin;
    end = q.stop[i] > end ? q.stop[i] : end;
  }
  for (int64_t j = 0; j < k; j++) {
    best[j] = Floats{} - INFINITY;
    which[j] = Ints{} - 1;
  }
  for (int64_t n = begin; n < end; n++) {
    Floats score = {};
    const float *given = q.scores + n * q.stride;
    if (q.count == LANES) {
      std::memcpy(&score, given, sizeof score);
    } else {
      std::memcpy(&score, given, 4 * q.count);
    }
    score = score > LOWEST ? score : Floats{} + LOWEST;
    score = score < HIGHEST ? score : Floats{} + HIGHEST;
    Ints block = Ints{} + static_cast<int32_t>(n);
    score = ((block >= from) & (block < to)) ? score : Floats{} - INFINITY;
    if (!any(score >= best[k - 1])) continue;
#pragma GCC unroll 16
    for (int64_t j = 0; j < k; j++) {
      const Ints wins = score >= best[j];
      const Floats other = best[j];
      const Ints other_block = which[j];
      best[j] = wins ? score : other;
      score = wins ? other : score;
      which[j] = wins ? block : other_block;
      block = wins ? other_block : block;
    }
  }
}

// The same, with places that a compiler can keep in registers.
template <int K>
void largest_in_registers(const Queries &q, Ints *which) {
  Floats best[K];
  Ints found[K];
  largest(q, K, best, found);
  std::memcpy(which, found, sizeof found);
}

constexpr int64_t MORE = 3;  // places that largest_of may write beyond k

void largest_of(const Queries &q, int64_t k, Floats *best, Ints *which) {
  if (k == 1) return largest_in_registers<1>(q, which);
  if (k == 2) return largest_in_registers<2>(q, which);
  if (k <= 4) return largest_in_registers<4>(q, which);
  if (k <= 7) return largest_in_registers<7>(q, which);
  if (k <= 11) return largest_in_registers<11>(q, which);
  if (k <= 15) return largest_in_registers<15>(q, which);
  largest(q, k, best, which);
}

template <class Index>
void choose(const float *scores, int64_t heads, int64_t blocks, int64_t group, int64_t count, const int64_t *first,
            const int64_t *stop, int64_t k, int64_t before, Index *index, int64_t index_stride) {
  std::vector<Floats> best(k);
  std::vector<Ints> which(k + MORE);
  for (int64_t head = 0; head < heads * group; head++) {
    const float *of_head = scores + (head / group * blocks * group + head % group) * count;
    for (int64_t t = 0; t < count; t += LANES) {
      const int64_t some = count - t < LANES ? count - t : LANES;
      largest_of({of_head + t, group * count, some, first + t, stop + t}, k, best.data(), which.data());
      for (int64_t i = 0; i < some; i++) {
        if (stop[t + i] - first[t + i] <= k) continue;  // has no choice
        Index *place = index + head * index_stride + (t + i) * k;
        for (int64_t j = 0; j < k; j++) place[j] = static_cast<Index>(before + which[j][i]);
      }
    }
  }
}

}  // namespace
}  // namespace moba

extern "C" {

// Scores [heads, blocks, group, count]; first and stop [count] of these blocks, whose first is number `before`; writes
// the queries that may choose among more than k: index [heads, group, ...], k each, `index_stride` from head to head.
void moba_choose(const float *scores, int64_t heads, int64_t blocks, int64_t group, int64_t count,
                 const int64_t *first, const int64_t *stop, int64_t k, int64_t before, void *index,
                 int64_t index_stride, int64_t index_bytes) {
  using moba::choose;
  if (index_bytes == 2) {
    choose(scores, heads, blocks, group, count, first, stop, k, before, static_cast<int16_t *>(index), index_stride);
  } else {
    choose(scores, heads, blocks, group, count, first, stop, k, before, static_cast<int32_t *>(index), index_stride);
  }
}

}  // extern "C"
