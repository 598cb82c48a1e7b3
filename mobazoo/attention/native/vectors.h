// Vectors as wide as the processor takes at once, in the words of GCC and clang: no instruction is named but where a
// vector's only other form is a loop over its numbers.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// Compilers count instructions, and do not know which of them run a million times.
#define MOBA_INLINE inline __attribute__((always_inline))

namespace moba {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float HIGHEST = std::numeric_limits<float>::max();
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t CACHE_LINE = 64;

inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

template <class Vector = Floats>
MOBA_INLINE Vector load(const void* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

template <class Vector>
MOBA_INLINE void store(void* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}

MOBA_INLINE Floats splat(float x) { return x - Floats{}; }

// A product as it is after rounding: what is added to one is otherwise added before.
template <class Number>
MOBA_INLINE Number rounded(Number product) {
#if defined(__AVX512F__)
  asm("" : "+v"(product));
#elif defined(__SSE2__)
  asm("" : "+x"(product));
#elif defined(__ARM_NEON)
  asm("" : "+w"(product));
#endif
  return product;
}

// `count` numbers of 32 bits, a multiple of LANES.
MOBA_INLINE void copy(const void* from, int64_t count, void* to) {
  const float* source = static_cast<const float*>(from);
  float* target = static_cast<float*>(to);
  for (int64_t i = 0; i < count; i += LANES) store(target + i, load(source + i));
}

MOBA_INLINE void expect(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += CACHE_LINE) __builtin_prefetch(static_cast<const char*>(row) + at);
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

// The larger of two, or the second where one is no number.
MOBA_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)  // where compilers take two instructions for what one does
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller of two, or the second where one is no number.
MOBA_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// 2 ** x, of which nothing is left far below 0, and 2 ** 127 at least beyond 127; what is no number stays none. EXACT
// to the last bit or two, else to 3e-6, as much as is left of it in bfloat16, and for numbers that come from products of
// bfloat16 only.
template <bool EXACT>
MOBA_INLINE Floats exp2_of(Floats x) {
#if defined(__AVX512DQ__)
  const Floats rest = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  constexpr float ROUNDS = 12582912.0f;  // 1.5 * 2 ** 23: a float beside it has no fraction
  x = smaller(splat(127.0f), x);
  const Floats whole = (x - 0.5f) + ROUNDS, rest = x - (whole - ROUNDS);
#endif
  // Taylor's coefficients log(2) ** n / n!, bent towards the smallest largest error for rest in 0 .. 1.
  Floats power;
  if constexpr (EXACT) {
    power = rest * 2.1612916e-4f + 1.2467846e-3f;
    power = power * rest + 9.6754516e-3f;
    power = power * rest + 5.5485281e-2f;
    power = power * rest + 2.4022931e-1f;
    power = power * rest + 6.9314704e-1f;
  } else {
    power = rest * 1.3426684e-2f + 5.2242474e-2f;
    power = power * rest + 2.4128020e-1f;
    power = power * rest + 6.9304484e-1f;
  }
  power = power * rest + 1.0f;
#if defined(__AVX512DQ__)
  return (Floats)_mm512_scalef_ps((__m512)power, (__m512)x);
#else
  const Ints exponent = (Ints)whole << 23;
  if constexpr (EXACT) {
    power *= (Floats)(exponent + (127 << 23));
  } else {
    power = (Floats)((Ints)power + exponent);  // 1 .. 2 has room above
  }
  return x < -125.0f ? Floats{} : power;
#endif
}

// While one lives, its thread takes results below 2 ** -126 for zero: processors take hundreds of cycles for them, and
// weights that small are many.
class Flushed {
 public:
#if defined(__SSE2__)
  Flushed() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~Flushed() { _mm_setcsr(before_); }
  Flushed(const Flushed&) = delete;

 private:
  const unsigned before_;
#else
  Flushed() {}
#endif
};

template <int H, bool SECOND, std::size_t... I>
MOBA_INLINE Ints mixed(Ints a, Ints b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (SECOND ? (I & H ? I + LANES : I + H) : (I & H ? I - H + LANES : I))...);
}

template <int H>
MOBA_INLINE void swap_corners(Ints* x) {
  constexpr auto all = std::make_index_sequence<LANES>();
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    if (i & H) continue;
    const Ints a = x[i], b = x[i + H];
    x[i] = mixed<H, false>(a, b, all);
    x[i + H] = mixed<H, true>(a, b, all);
  }
}

template <int H, class Both>
MOBA_INLINE void halve(Floats* x, const Both& both) {
  constexpr auto all = std::make_index_sequence<LANES>();
#pragma GCC unroll 8
  for (int i = 0; i < H; i++) {
    const Ints a = (Ints)x[i], b = (Ints)x[i + H];
    x[i] = both((Floats)mixed<H, false>(a, b, all), (Floats)mixed<H, true>(a, b, all));
  }
}

// What becomes of each of LANES vectors when both(a, b) takes its numbers together, such as their sums; x is used up.
template <class Both>
MOBA_INLINE Floats across(Floats* x, const Both& both) {
  if constexpr (LANES > 8) halve<8>(x, both);
  if constexpr (LANES > 4) halve<4>(x, both);
  halve<2>(x, both);
  halve<1>(x, both);
  return x[0];
}

// LANES rows of LANES words of 32 bits, whatever they hold: rows become columns.
MOBA_INLINE void transpose(Ints* x) {
  if constexpr (LANES > 8) swap_corners<8>(x);
  if constexpr (LANES > 4) swap_corners<4>(x);
  swap_corners<2>(x);
  swap_corners<1>(x);
}

// From `rows` rows of `words` words, `from_step` apart, to `words` rows of `rows`; both are multiples of LANES.
inline void transpose(const void* from, int64_t rows, int64_t words, int64_t from_step, void* to, int64_t to_step) {
  const int32_t* source = static_cast<const int32_t*>(from);
  int32_t* target = static_cast<int32_t*>(to);
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t w = 0; w < words; w += LANES) {
      Ints x[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) x[i] = load<Ints>(source + (r + i) * from_step + w);
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(target + (w + i) * to_step + r, x[i]);
    }
  }
}

}  // namespace moba
