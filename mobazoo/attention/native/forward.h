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
  float *top, *total;         // [rows]: the largest score in powers of two, and the sum of weights beside it
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
    float top[A::ROWS + LANES] = {}, total[A::ROWS];
    clock_.to(GATHER);
    for (int64_t i = 0; i < some.count; i++) {
      const int64_t row = some.rows[i];
      if (i + AHEAD < some.count) {
        const int64_t later = some.rows[i + AHEAD];
        expect(known.queries + later * width_.words, width_.words * sizeof(Word));
        expect(known.sums + later * width_.numbers, width_.numbers * sizeof(float));
      }
      copy(known.queries + row * width_.words, width_.words, queries_ + i * width_.words);
      copy(known.sums + row * width_.numbers, width_.numbers, sums_ + i * width_.numbers);
      top[i] = known.top[row];
      total[i] = known.total[row];
    }
    clock_.to(KERNEL);
    for (int64_t at = 0; at < width_.keys; at += CHUNK) {
      const int64_t most = widest(some, at), columns = round_up(most, A::COLUMNS);
      if (most <= 0) break;
      A::template multiply<true>(some.count, queries_, width_.words, 1, keys_.columns(at), STEP, width_.words, columns,
                                 scores_, STEP);
      soften(some, at, columns, top, total);
      A::template multiply<false>(some.count, weights_, STEP, 1, values_.rows(at), width_.numbers, columns / A::PAIR,
                                  width_.numbers, sums_, width_.numbers);
    }
    clock_.to(MERGE);
    for (int64_t i = 0; i < some.count; i++) {
      const int64_t row = some.rows[i];
      copy(sums_ + i * width_.numbers, width_.numbers, known.sums + row * width_.numbers);
      known.top[row] = top[i];
      known.total[row] = total[i];
    }
  }

  // Scores of a chunk become weights beside the largest score so far; sums and totals follow it.
  void soften(const Readers& some, int64_t at, int64_t columns, float* top, float* total) {
    float shrink[A::ROWS + LANES];
    for (int64_t i = 0; i < some.count; i++) {
      const float* scores = scores_ + i * STEP;
      const int64_t seen = std::min(some.seen[i] - at, columns);
      Floats most = splat(-INFINITE);
      int64_t j = 0;
      for (; j + LANES <= seen; j += LANES) most = larger(load(scores + j), most);
      if (j < seen) most = larger(visible(load(scores + j), seen - j, -INFINITE), most);
      shrink[i] = top[i];
      top[i] = std::max(top[i], largest_of(most) * scale_);
    }
    for (int64_t i = 0; i < some.count; i += LANES) {
      const Floats now = load(top + i);  // minus infinity where every score is: nothing shrinks, and weights are 0
      store(shrink + i, exp2_of<true>(load(shrink + i) - (now == -INFINITE ? Floats{} : now)));
    }
    for (int64_t i = 0; i < some.count; i++) {
      const float* scores = scores_ + i * STEP;
      Word* weights = weights_ + i * STEP;
      const int64_t seen = std::min(some.seen[i] - at, columns);
      const Floats base = splat(top[i] == -INFINITE ? 0.0f : top[i]);
      const auto weight = [&](int64_t j) __attribute__((always_inline)) {
        return exp2_of<A::EXACT>(load(scores + j) * scale_ - base);
      };
      Floats sum = {}, more = {};
      int64_t j = 0;
      for (; j + 2 * LANES <= seen; j += 2 * LANES) {
        const Floats first = weight(j), second = weight(j + LANES);
        sum += first;
        more += second;
        put_numbers(first, second, j, weights);
      }
      for (; j < columns; j += 2 * LANES) {
        const Floats first = visible(weight(j), seen - j, 0.0f),
                     second = visible(weight(j + LANES), seen - j - LANES, 0.0f);
        sum += first;
        more += second;
        put_numbers(first, second, j, weights);
      }
      total[i] = total[i] * shrink[i] + sum_of(sum + more);
      float* sums = sums_ + i * width_.numbers;
      for (int64_t d = 0; d < width_.numbers; d += LANES) store(sums + d, load(sums + d) * shrink[i]);
    }
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
