// Gradients of what some queries read of some keys, from the merged output and log-sum-exp.

#pragma once

#include "clock.h"
#include "laid.h"

namespace moba {

// What a piece's queries bring, and what comes of it.
template <class A>
struct Given {
  typename A::Word *queries, *douts;  // [rows, words]
  float *lse, *delta;                 // [rows]: log-sum-exp, and dout . out
  float* dq;                          // [rows, numbers], added to
};

template <class A>
class Backward {
 public:
  typedef typename A::Word Word;

  Backward(Room& room, Width<A> width, float scale, Clock& clock)
      : width_(width),
        scale_(scale),
        clock_(clock),
        keys_(room, width, true, true),
        values_(room, width, true, false),
        queries_(room, width),
        douts_(room, width),
        scores_(room.take<float>(A::ROWS * STEP)),
        slopes_(room.take<float>(A::ROWS * STEP)),
        weights_(room.take<Word>(A::ROWS * STEP)),
        pairs_(room.take<Word>(A::ROWS * STEP)),
        rows_(A::PAIR == 1 ? pairs_ : room.take<Word>(A::ROWS * STEP)),
        dq_(room.take<float>(A::ROWS * width.numbers)),
        dk_(room.take<float>(width.keys / CHUNK * width.numbers * STEP)),
        dv_(room.take<float>(width.keys / CHUNK * width.numbers * STEP)),
        turned_(room.take<float>(CHUNK * width.numbers)) {}

  template <class Element>
  void lay(const Element* k, int64_t k_step, const Element* v, int64_t v_step, int64_t count) {
    clock_.to(LAY);
    keys_.lay(k, k_step, count);
    values_.lay(v, v_step, count);
    const int64_t used = round_up(count, CHUNK) / CHUNK * width_.numbers * STEP;
    std::memset(dk_, 0, used * sizeof(float));
    std::memset(dv_, 0, used * sizeof(float));
  }

  void read(const Readers& all, const Given<A>& given) {
    by_tiles<A>(all, [&](const Readers& some) { tile(some, given); });
  }

  // Adds the gradients of the keys in hand, [count, dim].
  void collect(int64_t count, float* dk, float* dv) {
    clock_.to(MERGE);
    for (int64_t at = 0; at < count; at += CHUNK) {
      const int64_t chunk = at / CHUNK * width_.numbers * STEP, some = std::min(CHUNK, count - at);
      add_turned(dk_ + chunk, some, scale_, dk + at * width_.dim);
      add_turned(dv_ + chunk, some, 1.0f, dv + at * width_.dim);
    }
  }

 private:
  // Rows of queries as three products want them.
  struct Side {
    Word *rows, *paired, *turned;

    Side(Room& room, Width<A> width)
        : rows(room.take<Word>(A::ROWS * width.words)),
          paired(A::PAIR == 1 ? rows : room.take<Word>(A::ROWS / A::PAIR * width.numbers)),
          turned(A::TURNED ? room.take<Word>(A::ROWS / A::PAIR * width.numbers) : paired) {}

    void lay(const Readers& some, int64_t full, const Word* from, Width<A> width) {
      for (int64_t i = 0; i < some.count; i++) {
        if (i + AHEAD < some.count) expect(from + some.rows[i + AHEAD] * width.words, width.words * sizeof(Word));
        copy(from + some.rows[i] * width.words, width.words, rows + i * width.words);
      }
      std::memset(rows + some.count * width.words, 0, (full - some.count) * width.words * sizeof(Word));
      if constexpr (A::PAIR > 1) put_paired(rows, width.words, full, width.numbers, paired);
      if constexpr (A::TURNED) {
        transpose(paired, full / A::PAIR, width.numbers, width.numbers, turned, A::ROWS / A::PAIR);
      }
    }
  };

  void tile(const Readers& some, const Given<A>& given) {
    const int64_t full = round_up(some.count, A::DEPTH), words = width_.words, numbers = width_.numbers;
    clock_.to(GATHER);
    queries_.lay(some, full, given.queries, width_);
    douts_.lay(some, full, given.douts, width_);
    std::memset(dq_, 0, some.count * numbers * sizeof(float));
    clock_.to(KERNEL);
    for (int64_t at = 0; at < width_.keys; at += CHUNK) {
      const int64_t most = widest(some, at), columns = round_up(most, A::COLUMNS);
      if (most <= 0) break;
      const int64_t chunk = at / CHUNK * numbers * STEP;
      A::template multiply<true>(some.count, queries_.rows, words, 1, keys_.columns(at), STEP, words, columns, scores_,
                                 STEP);
      A::template multiply<true>(some.count, douts_.rows, words, 1, values_.columns(at), STEP, words, columns, slopes_,
                                 STEP);
      differentiate(some, at, full, columns, given);
      const int64_t row = A::TURNED ? A::ROWS / A::PAIR : 1, step = A::TURNED ? 1 : numbers;
      A::template multiply<false>(numbers, douts_.turned, row, step, weights_, STEP, full / A::PAIR, columns,
                                  dv_ + chunk, STEP);
      A::template multiply<false>(numbers, queries_.turned, row, step, pairs_, STEP, full / A::PAIR, columns,
                                  dk_ + chunk, STEP);
      A::template multiply<false>(some.count, rows_, STEP, 1, keys_.rows(at), numbers, columns / A::PAIR, numbers, dq_,
                                  numbers);
    }
    clock_.to(MERGE);
    for (int64_t i = 0; i < some.count; i++) {
      float* sum = given.dq + some.rows[i] * numbers;
      if (i + AHEAD < some.count) expect(given.dq + some.rows[i + AHEAD] * numbers, numbers * sizeof(float));
      for (int64_t d = 0; d < numbers; d += LANES) store(sum + d, load(sum + d) + load(dq_ + i * numbers + d) * scale_);
    }
  }

  // Weights from scores, and slopes, the gradients of scores, from the gradients of weights.
  void differentiate(const Readers& some, int64_t at, int64_t full, int64_t columns, const Given<A>& given) {
    for (int64_t i = 0; i < full; i += A::PAIR) {
      Row first(some, i, at, given);
      Row second(some, A::PAIR == 1 ? full : i + 1, at, given);
      Word *weights = weights_ + i / A::PAIR * STEP, *pairs = pairs_ + i / A::PAIR * STEP;
      for (int64_t j = 0; j < columns; j += 2 * LANES) {
        Floats weight[2][2] = {}, slope[2][2] = {};  // of two rows, and of twice LANES keys
        for (int half = 0; half < 2; half++) {
          evaluate(first, i, j + half * LANES, weight[0][half], slope[0][half]);
          if constexpr (A::PAIR > 1) evaluate(second, i + 1, j + half * LANES, weight[1][half], slope[1][half]);
          put_pairs(weight[0][half], weight[1][half], j + half * LANES, weights);
          put_pairs(slope[0][half], slope[1][half], j + half * LANES, pairs);
        }
        if constexpr (A::PAIR > 1) {
          put_numbers(slope[0][0], slope[0][1], j, rows_ + i * STEP);
          put_numbers(slope[1][0], slope[1][1], j, rows_ + (i + 1) * STEP);
        }
      }
    }
  }

  struct Row {
    int64_t seen = 0;
    float lse = 0, delta = 0;

    Row(const Readers& some, int64_t i, int64_t at, const Given<A>& given) {
      if (i >= some.count) return;
      seen = some.seen[i] - at;
      lse = given.lse[some.rows[i]];
      delta = given.delta[some.rows[i]];
    }
  };

  MOBA_INLINE void evaluate(const Row& row, int64_t i, int64_t j, Floats& weight, Floats& slope) const {
    if (j >= row.seen) {
      weight = slope = Floats{};
      return;
    }
    // Rounded as the log-sum-exp was, so that one of a single large score is that score.
    const Floats score = rounded(load(scores_ + i * STEP + j) * scale_);
    weight = exp2_of<A::EXACT>((score - row.lse) * static_cast<float>(M_LOG2E));
    slope = weight * (load(slopes_ + i * STEP + j) - row.delta);
    if (j + LANES > row.seen) {
      weight = visible(weight, row.seen - j, 0.0f);
      slope = visible(slope, row.seen - j, 0.0f);
    }
  }

  void add_turned(const float* columns, int64_t count, float scale, float* to) {
    const int64_t numbers = width_.numbers;
    transpose(columns, numbers, round_up(count, LANES), STEP, turned_, numbers);
    for (int64_t i = 0; i < count; i++) {
      float* row = to + i * width_.dim;
      for (int64_t d = 0; d < width_.dim; d++) row[d] += turned_[i * numbers + d] * scale;
    }
  }

  Width<A> width_;
  float scale_;
  Clock& clock_;
  Laid<A> keys_, values_;
  Side queries_, douts_;
  float *scores_, *slopes_;
  Word *weights_, *pairs_, *rows_;
  float *dq_, *dk_, *dv_, *turned_;
};

}  // namespace moba
