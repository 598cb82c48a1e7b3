// What torch's operators do badly on a CPU: choosing a few of many scores, and rows scattered through memory.
// Plain loops over raw memory; whoever calls them checks shapes and dtypes.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifdef __linux__
// Of the OpenMP that torch has loaded, so that its own threads do this too: they are awake, and have in their caches what
// they share of a kernel's work. Null where torch is built in another way.
extern "C" void GOMP_parallel(void (*work)(void *), void *given, unsigned threads, unsigned flags) __attribute__((weak));
extern "C" int omp_get_thread_num() __attribute__((weak));
extern "C" int omp_get_num_threads() __attribute__((weak));
#else
constexpr void (*GOMP_parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
constexpr int (*omp_get_thread_num)() = nullptr;
constexpr int (*omp_get_num_threads)() = nullptr;
#endif

namespace {

// As many floats as the processor takes at once.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float HIGHEST = std::numeric_limits<float>::max();

// Rows that are asked for ahead of the one in hand: they lie anywhere, so that the processor cannot foresee them.
constexpr int64_t AHEAD = 12;
constexpr int64_t CACHE_LINE = 64;

inline void expect(const void *row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch(static_cast<const char *>(row) + at);
}

inline bool any(Ints yes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)yes, (__m512i)yes);
#elif defined(__AVX__)
  return _mm256_movemask_ps((__m256)yes);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)yes);
#elif defined(__ARM_NEON)
  return vaddvq_s32((int32x4_t)yes) != 0;
#else
  return true;  // to find out would cost more than it saves
#endif
}

// Rows for one of several threads, at least.
constexpr int64_t ROWS = 128;

// Calls work(begin, end) for equal ranges of `count` rows, by so many threads at most.
template <class Work>
void share(int64_t threads, int64_t count, const Work &work) {
  const bool able = GOMP_parallel != nullptr && omp_get_thread_num != nullptr && omp_get_num_threads != nullptr;
  if (!able || threads < 2 || count < threads * ROWS) return work(0, count);
  struct Given {
    const Work &work;
    int64_t count;
  } given{work, count};
  GOMP_parallel(
      [](void *raw) {
        const Given &all = *static_cast<const Given *>(raw);
        const int64_t one = omp_get_thread_num(), of = omp_get_num_threads();  // which may be fewer than asked for
        all.work(all.count * one / of, all.count * (one + 1) / of);
      },
      &given, static_cast<unsigned>(threads), 0);
}

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

// A counting sort: how many read each block, then everyone's row, in order of blocks and ascending inside one.
template <class Index>
void readers(const Index *index, int64_t group, int64_t group_stride, int64_t length, int64_t k, const int64_t *late,
             int64_t count, int64_t blocks, int64_t *counts, int64_t *rows) {
  std::vector<int64_t> next(blocks + 1);
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t g = 0; g < group; g++) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t t = late == nullptr ? i : late[i];
        const Index *chosen = index + g * group_stride + t * k;
        for (int64_t j = 0; j < k; j++) {
          const int64_t block = chosen[j];
          if (block < 0 || block >= blocks) continue;  // an empty place
          if (pass == 0) {
            counts[block]++;
          } else {
            rows[next[block]++] = g * length + t;
          }
        }
      }
    }
    if (pass == 0) {
      for (int64_t block = 0; block < blocks; block++) next[block + 1] = next[block] + counts[block];
    }
  }
}

inline float wide(float x) { return x; }

inline float wide(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class Part>
void add(float *sums, const int64_t *rows, int64_t count, int64_t dim, const Part *part, float scale) {
  for (int64_t i = 0; i < count; i++) {
    if (i + AHEAD < count) expect(sums + rows[i + AHEAD] * dim, 4 * dim);
    float *sum = sums + rows[i] * dim;
    const Part *more = part + i * dim;
    for (int64_t d = 0; d < dim; d++) sum[d] += scale * wide(more[d]);
  }
}

}  // namespace

extern "C" {

// Scores [heads, blocks, group, count]; first and stop [count] of these blocks, whose first is number `before`; writes
// the queries that may choose among more than k: index [heads, group, ...], k each, `index_stride` from head to head.
void moba_choose(const float *scores, int64_t heads, int64_t blocks, int64_t group, int64_t count,
                 const int64_t *first, const int64_t *stop, int64_t k, int64_t before, void *index,
                 int64_t index_stride, int64_t index_bytes) {
  if (index_bytes == 2) {
    choose(scores, heads, blocks, group, count, first, stop, k, before, static_cast<int16_t *>(index), index_stride);
  } else {
    choose(scores, heads, blocks, group, count, first, stop, k, before, static_cast<int32_t *>(index), index_stride);
  }
}

// The rows g * length + t that read each block: index [group, ...], k each, `group_stride` from head to head, of the
// queries late [count] (null: the first `count`). Counts [blocks] begin at 0; rows have place for every entry.
void moba_readers(const void *index, int64_t index_bytes, int64_t group, int64_t group_stride, int64_t length,
                  int64_t k, const int64_t *late, int64_t count, int64_t blocks, int64_t *counts, int64_t *rows) {
  if (index_bytes == 2) {
    readers(static_cast<const int16_t *>(index), group, group_stride, length, k, late, count, blocks, counts, rows);
  } else {
    readers(static_cast<const int32_t *>(index), group, group_stride, length, k, late, count, blocks, counts, rows);
  }
}

// to[i] = from[rows[i]], rows of `bytes`.
void moba_gather(const char *from, const int64_t *rows, int64_t count, int64_t bytes, char *to, int64_t threads) {
  share(threads, count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (i + AHEAD < end) expect(from + rows[i + AHEAD] * bytes, bytes);
      std::memcpy(to + i * bytes, from + rows[i] * bytes, bytes);
    }
  });
}

// Merges partial softmaxes into rows: the weight of the second is a sigmoid of the gap of their log-sum-exps.
void moba_fold(float *out, float *lse, const int64_t *rows, int64_t count, int64_t dim, const float *part,
               const float *part_lse, int64_t threads) {
  share(threads, count, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (i + AHEAD < end) {
        expect(out + rows[i + AHEAD] * dim, 4 * dim);
        expect(lse + rows[i + AHEAD], 4);
      }
      const float old = lse[rows[i]], gap = part_lse[i] - old;
      const float less = std::exp(-std::fabs(gap));  // of the two, divided by the larger one
      const float weight = (gap > 0 ? 1.0f : less) / (1.0f + less);
      float *row = out + rows[i] * dim;
      const float *more = part + i * dim;
      for (int64_t d = 0; d < dim; d++) row[d] += weight * (more[d] - row[d]);
      lse[rows[i]] = (gap > 0 ? part_lse[i] : old) + std::log1p(less);
    }
  });
}

// sums[rows[i]] += scale * part[i]
void moba_add(float *sums, const int64_t *rows, int64_t count, int64_t dim, const float *part, float scale) {
  add(sums, rows, count, dim, part, scale);
}

void moba_add_bfloat16(float *sums, const int64_t *rows, int64_t count, int64_t dim, const uint16_t *part,
                       float scale) {
  add(sums, rows, count, dim, part, scale);
}

}  // extern "C"
