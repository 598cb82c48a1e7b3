// Attention of some queries to some keys, as one step of a running softmax.

#pragma once

#include "clock.h"
#include "laid.h"

namespace moba {

// What a piece's queries know so far: the softmax of the keys that they have read, not divided by its sum.
template <class A>
struct Running {
  typename A::Word* queries;  // [rows, words]
  float* sums;                // [rows, numbers]
  float *top, *total;         // [rows]: the largest score, or one not far below, and the sum of weights beside it
};

template <class A>
class Forward {
 public:
  typedef typename A::Word Word;

  Forward(Room& room, Width<A> width, float scale, Clock& clock)
      : width_(width),
        scale_(scale * static_cast<float>(M_LOG2E)),
        clock_(clock),
        keys_(room, width, true, false),
        values_(room, width, false, true),
        queries_(room.take<Word>(A::ROWS * width.words)),
        sums_(room.take<float>(A::ROWS * width.numbers)),
        scores_(room.take<float>(A::ROWS * STEP)),
        weights_(room.take<Word>(A::ROWS * STEP)) {}

  template <class Element>
  void lay(const Element* k, int64_t k_step, const Element* v, int64_t v_step, int64_t count) {
    clock_.to(LAY);
    keys_.lay(k, k_step, count);
    values_.lay(v, v_step, count);
  }

  void read(const Readers& all, const Running<A>& known) {
    by_tiles<A>(all, [&](const Readers& some) { tile(some, known); });
  }

 private:
  void tile(const Readers& some, const Running<A>& known) {
    alignas(CACHE_LINE) float top[A::ROWS], total[A::ROWS];
    std::fill_n(top, A::ROWS, 0.0f);
    std::fill_n(total, A::ROWS, 0.0f);
    clock_.to(GATHER);
    for (int64_t i = 0; i < some.count; i++) {
      const int64_t row = some.rows[i];
      if (i + AHEAD < some.count) {
        expect(known.queries + some.rows[i + AHEAD] * width_.words, width_.words * sizeof(Word));
      }
      copy(known.queries + row * width_.words, width_.words, queries_ + i * width_.words);
      top[i] = known.top[row];
      total[i] = known.total[row];
    }
    clock_.to(KERNEL);
    for (int64_t at = 0; at < width_.keys; at += CHUNK) {
      const int64_t most = widest(some, at), columns = round_up(most, A::COLUMNS);
      if (most <= 0) break;
      for (int64_t from = 0; from < some.count; from += A::SCORED) {  // so few that their scores stay in cache
        const int64_t rows = std::min<int64_t>(A::SCORED, some.count - from);
        A::template multiply<true>(rows, queries_ + from * width_.words, width_.words, 1, keys_.columns(at), STEP,
                                   width_.words, columns, scores_, STEP);
        soften(some, from, from + rows, at, columns, top, total, known);
      }
      const auto multiply = at == 0 ? A::template multiply<true> : A::template multiply<false>;
      multiply(some.count, weights_, STEP, 1, values_.rows(at), width_.numbers, columns / A::PAIR, width_.numbers,
               sums_, width_.numbers);
    }
    clock_.to(MERGE);
    for (int64_t i = 0; i < some.count; i++) {
      const int64_t row = some.rows[i];
      if (i + AHEAD < some.count) {
        expect(known.sums + some.rows[i + AHEAD] * width_.numbers, width_.numbers * sizeof(float));
      }
      const float* more = sums_ + i * width_.numbers;
      float* sums = known.sums + row * width_.numbers;
      for (int64_t d = 0; d < width_.numbers; d += LANES) store(sums + d, load(sums + d) + load(more + d));
      known.top[row] = top[i];
      known.total[row] = total[i];
    }
  }

  // Some rows of a tile, LANES at most, and the columns of a chunk.
  struct Group {
    int64_t first, scored, rows;  // the first row in its tile and among scores, and how many
    int64_t at, columns;
    const int32_t* seen;

    int64_t sees(int64_t i) const { return std::min(seen[i] - at, columns); }
  };

  // Scores of a chunk become weights beside a row's top: the largest score so far, or one that it is not far above.
  // Few chunks bring another, so that weights are tried beside the one that is known, and their sum tells.
  void soften(const Readers& some, int64_t begin, int64_t end, int64_t at, int64_t columns, float* top, float* total,
              const Running<A>& known) {
    constexpr float FAR = 8, MUCH = 256 * CHUNK;  // 2 ** FAR for each key
    for (int64_t from = begin; from < end; from += LANES) {
      const Group group{from, from - begin, std::min<int64_t>(LANES, end - from), at, columns, some.seen + from};
      const Floats before = load(top + from);
      Floats sums = any(before == -INFINITE) ? splat(INFINITE) : weigh(group, before);
      if (any(!(sums < MUCH))) {
        const Floats found = largest(group);
        const Ints none = before == -INFINITE;
        const Floats now = (none | ((found - before) * scale_ > FAR)) ? found : before;
        const Floats shrink = exp2_of<true>((before - now) * scale_);
        for (int64_t i = 0; i < group.rows; i++) {
          if (now[i] == before[i] || none[i]) continue;  // or there is nothing yet
          scale(known.sums + some.rows[from + i] * width_.numbers, shrink[i]);
          if (at > 0) scale(sums_ + (from + i) * width_.numbers, shrink[i]);
          total[from + i] *= shrink[i];
        }
        store(top + from, now);
        sums = weigh(group, now);
      }
      store(total + from, load(total + from) + sums);
    }
  }

  void scale(float* sums, float by) const {
    for (int64_t d = 0; d < width_.numbers; d += LANES) store(sums + d, load(sums + d) * by);
  }

  // The largest score that each row sees.
  Floats largest(const Group& group) const {
    Floats most[LANES];
    for (int64_t i = 0; i < LANES; i++) most[i] = i < group.rows ? largest_of_row(group, i) : splat(-INFINITE);
    return across(most, [](Floats a, Floats b) { return larger(a, b); });
  }

  MOBA_INLINE Floats largest_of_row(const Group& group, int64_t i) const {
    const float* scores = scores_ + (group.scored + i) * STEP;
    const int64_t seen = group.sees(i);
    Floats most = splat(-INFINITE);
    int64_t j = 0;
    for (; j + LANES <= seen; j += LANES) most = larger(load(scores + j), most);
    if (j < seen) most = larger(visible(load(scores + j), seen - j, -INFINITE), most);
    return most;
  }

  // Writes weights beside `top`, and returns each row's sum.
  MOBA_INLINE Floats weigh(const Group& group, Floats top) {
    const Floats base = top == -INFINITE ? Floats{} : top;  // where every score is: weights are 0
    Floats sums[LANES] = {};
    for (int64_t i = 0; i < group.rows; i++) sums[i] = weigh_row(group, i, base[i]);
    return across(sums, [](Floats a, Floats b) { return a + b; });
  }

  MOBA_INLINE Floats weigh_row(const Group& group, int64_t i, float base) {
    const float* scores = scores_ + (group.scored + i) * STEP;
    Word* weights = weights_ + (group.first + i) * STEP;
    const int64_t seen = group.sees(i);
    const auto weight = [&](int64_t j) __attribute__((always_inline)) {
      return exp2_of<A::EXACT>((load(scores + j) - base) * scale_);  // the top's is 1, however large it is
    };
    Floats sum = {}, more = {};
    int64_t j = 0;
    for (; j + 2 * LANES <= seen; j += 2 * LANES) {
      const Floats first = weight(j), second = weight(j + LANES);
      sum += first;
      more += second;
      put_numbers(first, second, j, weights);
    }
    for (; j < group.columns; j += 2 * LANES) {
      const Floats first = visible(weight(j), seen - j, 0.0f),
                   second = visible(weight(j + LANES), seen - j - LANES, 0.0f);
      sum += first;
      more += second;
      put_numbers(first, second, j, weights);
    }
    return sum + more;
  }

  Width<A> width_;
  float scale_;  // at least 0, in powers of two
  Clock& clock_;
  Laid<A> keys_, values_;
  Word* queries_;
  float *sums_, *scores_;
  Word* weights_;
};

}  // namespace moba
