// The gate: the few blocks of many that each query reads.

#include "attention.h"
#include "dispatch.h"
#include "laid.h"
#include "pieces.h"
#include "threads.h"

namespace moba {
namespace {

// What Python hands over: `_Gate` in gate.py, field for field.
struct Gate {
  const void *q, *mean;         // [B, Hq, T, D] and [B, Hkv, N, D]
  const int32_t *first, *stop;  // [B, T]: a query may choose among blocks first .. stop - 1; neither decreases
  void* index;                  // [B, Hq, T, k]: written
  Strides q_at, mean_at, index_at;
  Strides first_at, stop_at;  // without heads
  int64_t batch, heads, group, tokens, blocks, dim, reads, index_bytes, threads;
};

// Rows of a piece: many should read the centroids that are laid out for it. And bytes that they may know so far.
constexpr int64_t MOST = 8192, LEAST = 512, KNOWN_BYTES = 4 << 20;

constexpr int64_t WIDE = PACKED + 16;  // from a row of scores to the next, so that rows do not share a set of the cache
constexpr int64_t MORE = 3;            // places that may be written beyond k
constexpr int64_t MOST_PARTS = 8;      // vectors of maxima: for more, none are taken

// Up to LANES queries, and their scores with some blocks.
struct Some {
  float* scores;      // [LANES, WIDE]
  int64_t from, to;   // columns of interest, multiples of LANES
  int64_t begin;      // the block of column 0
  int64_t count;      // queries
  Ints first, stop;   // columns that each may choose
  int64_t reads;      // k
  Floats* best;       // [k + MORE]: the largest scores so far, largest first
  Ints* which;        // [k + MORE]: and their blocks
  float* found;       // [LANES, WIDE]: room for scores that may be among the largest
  int32_t* found_in;  // [LANES, WIDE]: and for their columns
};

Ints numbers() {
  Ints x = {};
  for (int i = 0; i < LANES; i++) x[i] = i;
  return x;
}

// Columns that a query may not choose must raise no maximum.
void hide(const Some& some) {
  const Ints number = numbers();
  for (int64_t i = 0; i < some.count; i++) {
    float* row = some.scores + i * WIDE;
    const Ints first = Ints{} + some.first[i], stop = Ints{} + some.stop[i];
    const auto mask = [&](int64_t j) {
      const Ints column = number + static_cast<int32_t>(j);
      store(row + j, ((column >= first) & (column < stop)) ? load(row + j) : splat(-INFINITE));
    };
    for (int64_t j = some.from; j < some.to && j < some.first[i]; j += LANES) mask(j);
    for (int64_t j = std::max<int64_t>(some.from, some.stop[i] / LANES * LANES); j < some.to; j += LANES) mask(j);
  }
}

// Writes the numbers of `x` that are not below `least`, and their columns; returns how many. A whole vector is written.
inline int64_t pack(Floats x, Floats least, Ints column, float* found, int32_t* found_in) {
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)least, _CMP_NLT_UQ);
  _mm512_storeu_ps(found, _mm512_maskz_compress_ps(kept, (__m512)x));
  _mm512_storeu_si512(found_in, _mm512_maskz_compress_epi32(kept, (__m512i)column));
  return __builtin_popcount(kept);
#else
  const Ints below = x < least;
  int64_t count = 0;
  if (!any(~below)) return 0;
  for (int i = 0; i < LANES; i++) {
    found[count] = x[i];
    found_in[count] = column[i];
    count += below[i] + 1;
  }
  return count;
#endif
}

// Puts a score of each query where it belongs among the k best; among equal ones the later block wins.
inline __attribute__((always_inline)) void insert(Floats score, Ints block, int64_t k, Floats* best, Ints* which) {
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

// A score that `reads` blocks of each query reach at least: that many-th of the maxima over disjoint columns, of which
// the `k` largest are kept in `top`.
inline __attribute__((always_inline)) Floats reached(const Some& some, int64_t k, int64_t parts, Floats* top) {
  for (int64_t j = 0; j < k; j++) top[j] = splat(-INFINITE);
  for (int64_t part = 0; part < parts; part++) {
    Ints most[LANES];
    for (int64_t i = 0; i < LANES; i++) {
      const float* row = some.scores + i * WIDE;
      Floats x = splat(-INFINITE);
      for (int64_t j = some.from + part * LANES; j < some.to; j += parts * LANES) x = larger(load(row + j), x);
      most[i] = (Ints)x;
    }
    transpose(most);
    for (int i = 0; i < LANES; i++) {
      Floats x = (Floats)most[i];
#pragma GCC unroll 16
      for (int64_t j = 0; j < k; j++) {
        const Floats other = top[j];
        top[j] = x > other ? x : other;
        x = x > other ? other : x;
      }
    }
  }
  return top[some.reads - 1];
}

// Takes these columns' scores among the best. K places are kept in registers, or with 0 as many as are asked for.
template <int64_t K>
void choose(const Some& some) {
  const int64_t k = K > 0 ? K : some.reads;
  Floats in_registers[K > 0 ? K : 1];
  Ints which_in_registers[K > 0 ? K : 1];
  Floats* best = K > 0 ? in_registers : some.best;
  Ints* which = K > 0 ? which_in_registers : some.which;
  const int64_t parts = (2 * k + LANES - 1) / LANES;

  // Few columns reach what k maxima do. What is no number, or lower than the lowest, counts as that: then all may.
  Floats least = splat(-INFINITE);
  if (K > 0) {
    Floats top[K > 0 ? K : 1];
    least = reached(some, k, parts, top);
  } else if (parts <= MOST_PARTS) {
    Floats top[MOST_PARTS * LANES];
    least = reached(some, k, parts, top);
  }
  least = larger(some.best[some.reads - 1], least);
  least = least < HIGHEST ? least : splat(HIGHEST);
  least = least > LOWEST ? least : splat(-INFINITE);
  const Ints number = numbers();
  Ints found = {};
  int64_t most = 0;
  for (int64_t i = 0; i < some.count; i++) {
    const float* row = some.scores + i * WIDE;
    float* to = some.found + i * WIDE;
    int32_t* to_in = some.found_in + i * WIDE;
    const Floats own = splat(least[i]);
    int64_t count = 0;
    Ints column = number + static_cast<int32_t>(some.from);
    for (int64_t j = some.from; j < some.to; j += LANES) {
      count += pack(load(row + j), own, column, to + count, to_in + count);
      column += LANES;
    }
    found[i] = static_cast<int32_t>(count);
    most = std::max(most, count);
  }

  if (K > 0) std::memcpy(best, some.best, k * sizeof(Floats));
  if (K > 0) std::memcpy(which, some.which, k * sizeof(Ints));
  for (int64_t at = 0; at < most; at += LANES) {
    Ints scores[LANES], columns[LANES];
    for (int i = 0; i < LANES; i++) {
      scores[i] = load<Ints>(some.found + i * WIDE + at);
      columns[i] = load<Ints>(some.found_in + i * WIDE + at);
    }
    transpose(scores);
    transpose(columns);
    for (int64_t j = 0; j < LANES && at + j < most; j++) {
      Floats score = larger((Floats)scores[j], splat(LOWEST));
      score = score < HIGHEST ? score : splat(HIGHEST);
      const Ints column = columns[j], is = Ints{} + static_cast<int32_t>(at + j) < found;
      score = (is & (column >= some.first) & (column < some.stop)) ? score : splat(-INFINITE);
      insert(score, column + static_cast<int32_t>(some.begin), k, best, which);
    }
  }
  if (K > 0) std::memcpy(some.best, best, k * sizeof(Floats));
  if (K > 0) std::memcpy(some.which, which, k * sizeof(Ints));
}

void choose_some(const Some& some) {
  hide(some);
  const int64_t k = some.reads;
  if (k == 1) return choose<1>(some);
  if (k == 2) return choose<2>(some);
  if (k <= 4) return choose<4>(some);
  if (k <= 7) return choose<7>(some);
  if (k <= 11) return choose<11>(some);
  if (k <= 15) return choose<15>(some);
  choose<0>(some);
}

// Rows of a piece at most: what they know so far is kept while blocks come in several parts.
template <class A>
int64_t most_rows(const Gate& gate) {
  const int64_t bytes = (std::min(gate.reads, gate.blocks) + MORE) * (sizeof(float) + sizeof(int32_t));
  return std::min(MOST, std::max<int64_t>(A::ROWS, KNOWN_BYTES / bytes / LANES * LANES));
}

template <class A, class Element>
class GateWork {
 public:
  typedef typename A::Word Word;
  static_assert(A::ROWS % LANES == 0, "queries are chosen for in whole vectors");

  GateWork(const Gate& gate, int64_t rows)
      : gate_(gate),
        width_(gate.dim, gate.blocks),
        places_(std::min(gate.reads, gate.blocks) + MORE),
        laid_(room_, width_, true, false),
        queries_(room_.take<Word>(A::ROWS * width_.words)),
        scores_(room_.take<float>(A::ROWS * WIDE)),
        found_(room_.take<float>(LANES * WIDE)),
        found_in_(room_.take<int32_t>(LANES * WIDE)),
        known_(gate.blocks <= PACKED ? A::ROWS : round_up(rows, LANES)),
        best_(room_.take<Floats>(known_ / LANES * places_)),
        which_(room_.take<Ints>(known_ / LANES * places_)) {
    rows_.reserve(rows);
  }

  void operator()(const Piece& piece) {
    rows_.resize(piece.tokens() * gate_.group);
    Row* next = rows_.data();
    for (int64_t t = piece.begin; t < piece.end; t++) {
      const int64_t first = std::max(0, gate_.first[piece.row * gate_.first_at.row + t * gate_.first_at.token]);
      const int64_t stop =
          std::min<int64_t>(gate_.blocks, gate_.stop[piece.row * gate_.stop_at.row + t * gate_.stop_at.token]);
      for (int64_t g = 0; g < gate_.group; g++) {
        *next = {static_cast<int32_t>(piece.head * gate_.group + g), static_cast<int32_t>(t),
                 static_cast<int32_t>(first), static_cast<int32_t>(stop)};
        if (stop - first > gate_.reads) {
          next++;
        } else {
          read_all(piece.row, *next);
        }
      }
    }
    rows_.resize(next - rows_.data());
    if (rows_.empty()) return;
    const int64_t rows = static_cast<int64_t>(rows_.size()), begin = rows_.front().first, end = rows_.back().stop;
    for (int64_t at = begin; at < end; at += PACKED) {
      const int64_t count = std::min(PACKED, end - at);
      const Element* mean = place<Element>(gate_.mean, gate_.mean_at, piece.row, piece.head, at);
      laid_.lay(mean, gate_.mean_at.token, count);
      for (int64_t r = 0; r < rows; r += A::ROWS) {
        tile(piece.row, r, std::min<int64_t>(A::ROWS, rows - r), at, count, at == begin, at + count == end);
      }
    }
  }

 private:
  struct Row {
    int32_t head, token, first, stop;
  };

  int64_t index_of(int64_t row, const Row& of) const {
    return row * gate_.index_at.row + of.head * gate_.index_at.head + of.token * gate_.index_at.token;
  }

  // Every block that the query may read, the most recent first.
  void read_all(int64_t row, const Row& of) {
    const int64_t at = index_of(row, of);
    for (int32_t j = 0, block = of.stop - 1; j < gate_.reads; j++, block--) {
      const int32_t read = block >= of.first ? block : -1;
      if (gate_.index_bytes == 2) {
        static_cast<int16_t*>(gate_.index)[at + j] = static_cast<int16_t>(read);
      } else {
        static_cast<int32_t*>(gate_.index)[at + j] = read;
      }
    }
  }

  // The best blocks of up to LANES queries, `which` [k].
  template <class Index>
  void read_best(int64_t row, const Row* of, int64_t count, const Ints* which) {
    Index* to[LANES];
    for (int64_t n = 0; n < count; n++) to[n] = static_cast<Index*>(gate_.index) + index_of(row, of[n]);
    for (int64_t j = 0; j < gate_.reads; j++) {
      for (int64_t n = 0; n < count; n++) to[n][j] = static_cast<Index>(which[j][n]);
    }
  }

  void tile(int64_t row, int64_t begin, int64_t count, int64_t at, int64_t blocks, bool fresh, bool last) {
    const Row* rows = rows_.data() + begin;
    const int64_t from = std::max<int64_t>(0, rows[0].first - at) / A::COLUMNS * A::COLUMNS;
    const int64_t to = round_up(std::max<int64_t>(0, std::min(blocks, rows[count - 1].stop - at)), A::COLUMNS);
    if (from < to) {
      for (int64_t i = 0; i < count; i++) {
        const Element* q = place<Element>(gate_.q, gate_.q_at, row, rows[i].head, rows[i].token);
        put_row(q, width_.dim, queries_ + i * width_.words);
      }
    }
    for (int64_t j = from; j < to; j = (j / CHUNK + 1) * CHUNK) {
      A::template multiply<true>(count, queries_, width_.words, 1, laid_.columns(j) + j % CHUNK, STEP, width_.words,
                                 std::min(to, (j / CHUNK + 1) * CHUNK) - j, scores_ + j, WIDE);
    }
    for (int64_t i = 0; i < count; i += LANES) {
      const int64_t known = ((gate_.blocks <= PACKED ? 0 : begin) + i) / LANES * places_;
      Some some = {scores_ + i * WIDE,
                   0,
                   0,
                   at,
                   std::min<int64_t>(LANES, count - i),
                   {},
                   {},
                   gate_.reads,
                   best_ + known,
                   which_ + known,
                   found_,
                   found_in_};
      if (fresh) {
        std::fill_n(some.best, places_, splat(-INFINITE));
        std::fill_n(some.which, places_, Ints{} - 1);
      }
      for (int64_t n = 0; n < some.count; n++) {
        some.first[n] = static_cast<int32_t>(std::max<int64_t>(0, rows[i + n].first - at));
        some.stop[n] = static_cast<int32_t>(std::min(blocks, std::max<int64_t>(0, rows[i + n].stop - at)));
      }
      some.from = some.first[0] / LANES * LANES;
      some.to = round_up(some.stop[some.count - 1], LANES);
      if (some.from < some.to) choose_some(some);
      if (!last) continue;
      if (gate_.index_bytes == 2) {
        read_best<int16_t>(row, rows + i, some.count, some.which);
      } else {
        read_best<int32_t>(row, rows + i, some.count, some.which);
      }
    }
  }

  const Gate& gate_;
  Room room_;
  Width<A> width_;
  int64_t places_;
  Laid<A> laid_;
  Word* queries_;
  float *scores_, *found_;
  int32_t* found_in_;
  int64_t known_;
  Floats* best_;
  Ints* which_;
  std::vector<Row> rows_;  // those who have a choice
};

template <class A, class Element>
void choose(const Gate& gate) {
  const int64_t tokens = cut_tokens(gate, LEAST, most_rows<A>(gate));
  const Pieces pieces(gate, tokens);
  Queue queue(pieces.count());
  together(std::min(gate.threads, pieces.count()), [&] {
    int64_t number;
    if (!queue.next(number)) return;
    GateWork<A, Element> work(gate, std::min(tokens, gate.tokens) * gate.group);
    A::begin();
    do work(pieces[number]);
    while (queue.next(number));
    A::end();
  });
}

}  // namespace
}  // namespace moba

extern "C" {

// `narrow` as dispatch.h has it.
int64_t moba_gate(const moba::Gate* gate, int64_t narrow) {
  return moba::dispatch(
      narrow, [&](auto arithmetic, auto element) { moba::choose<decltype(arithmetic), decltype(element)>(*gate); });
}

}  // extern "C"
