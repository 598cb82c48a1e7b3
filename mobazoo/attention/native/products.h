// Small matrix products in registers, of words: a float, or two bfloat16 that are multiplied and added at once.

#pragma once

#include "vectors.h"

namespace moba {

struct Bfloat16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }

inline float wide(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounded to the nearest, to even between two; what is no number stays none.
inline void narrow(float x, Bfloat16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  y.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// float32 as it is.
struct Single {
  typedef float Word;
  typedef Floats Words;
  static constexpr int PAIR = 1;  // numbers in a word
  static constexpr bool EXACT = true;
  static Floats madd(Floats sum, Word a, Words b) { return sum + a * b; }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define MOBA_PAIRS
// bfloat16, its products and sums in float32.
struct Pairs {
  typedef int32_t Word;
  typedef Ints Words;
  static constexpr int PAIR = 2;
  static constexpr bool EXACT = false;
  static Floats madd(Floats sum, Word a, Words b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

// Rows and vectors of a product that its registers hold: there are 16 of them or 32.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int MOST_VECTORS = 4;
#else
constexpr int MOST_VECTORS = 2;
#endif
constexpr int MOST_ROWS = 6;
constexpr int ROW_UNIT = 2;  // rows are computed two at least

// c [R, V * LANES] (+)= a [R, depth] b [depth, V * LANES], a's rows `a_row` and its columns `a_step` apart.
template <class Number, int R, int V, bool FRESH>
inline void product(const typename Number::Word* a, int64_t a_row, int64_t a_step, const typename Number::Word* b,
                    int64_t b_step, int64_t depth, float* c, int64_t c_step) {
  Floats sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = FRESH ? Floats{} : load(c + r * c_step + v * LANES);
  }
  for (int64_t k = 0; k < depth; k++) {
    typename Number::Words right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = load<typename Number::Words>(b + k * b_step + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const typename Number::Word left = a[r * a_row + k * a_step];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = Number::madd(sum[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(c + r * c_step + v * LANES, sum[r][v]);
  }
}

// What the tiles of attention ask of arithmetic, by vectors.
template <class Number>
struct Vectors : Number {
  typedef typename Number::Word Word;
  static constexpr int ROWS = 48;                       // queries of a tile
  static constexpr int SCORED = ROWS;                   // of them, those whose scores are made at once
  static constexpr int WORDS = LANES, COLUMNS = LANES;  // words of a row, and columns of a product, are multiples
  static constexpr int DEPTH = Number::PAIR;            // and rows that a product sums over
  static constexpr bool TURNED = false;                 // a's columns may be farther apart than its rows

  static bool able() { return true; }

  static void begin() {}
  static void end() {}

  // c [rows, columns] (+)= a [rows, depth] b [depth, columns]; one row more may be read and written.
  template <bool FRESH>
  static void multiply(int64_t rows, const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t b_step,
                       int64_t depth, int64_t columns, float* c, int64_t c_step) {
    int64_t j = 0;
    for (; MOST_VECTORS > 2 && j + 4 * LANES <= columns; j += 4 * LANES) {
      strip<MOST_VECTORS, FRESH>(rows, a, a_row, a_step, b + j, b_step, depth, c + j, c_step);
    }
    for (; j + 2 * LANES <= columns; j += 2 * LANES) {
      strip<2, FRESH>(rows, a, a_row, a_step, b + j, b_step, depth, c + j, c_step);
    }
    if (j < columns) strip<1, FRESH>(rows, a, a_row, a_step, b + j, b_step, depth, c + j, c_step);
  }

 private:
  template <int V, bool FRESH>
  static void strip(int64_t rows, const Word* a, int64_t a_row, int64_t a_step, const Word* b, int64_t b_step,
                    int64_t depth, float* c, int64_t c_step) {
    int64_t i = 0;
    for (; i + MOST_ROWS <= rows; i += MOST_ROWS) {
      product<Number, MOST_ROWS, V, FRESH>(a + i * a_row, a_row, a_step, b, b_step, depth, c + i * c_step, c_step);
    }
    for (; i < rows; i += ROW_UNIT) {
      product<Number, ROW_UNIT, V, FRESH>(a + i * a_row, a_row, a_step, b, b_step, depth, c + i * c_step, c_step);
    }
  }
};

}  // namespace moba
