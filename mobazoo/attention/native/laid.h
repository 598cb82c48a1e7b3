// Keys and queries laid out for products: padded, as rows and as columns, bfloat16 in pairs.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "products.h"

namespace moba {

constexpr int64_t CHUNK = 128;         // keys whose scores are in hand at once
constexpr int64_t STEP = CHUNK + 16;   // from a row of them to the next, so that rows do not share a set of the cache
constexpr int64_t PACKED = 4 * CHUNK;  // keys that are laid out for products at once, at most
constexpr int64_t AHEAD = 8;           // rows that are asked for ahead of the one in hand: they lie anywhere
constexpr int64_t SPARE = 2 * STEP;    // beyond each buffer, for rows that are computed and not wanted

// Memory of one thread, given back with it.
class Room {
 public:
  template <class T>
  T* take(int64_t count, bool zero = true) {
    const std::size_t bytes = round_up((count + SPARE) * sizeof(T), CACHE_LINE);
    void* place = std::aligned_alloc(CACHE_LINE, bytes);
    if (place == nullptr) throw std::bad_alloc();
    if (zero) std::memset(place, 0, bytes);
    kept_.emplace_back(place, std::free);
    return static_cast<T*>(place);
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> kept_;
};

// Sizes for an arithmetic: a row is `words` of what is multiplied, `numbers` in float32; of `slots` keys so many are
// laid out at once.
template <class A>
struct Width {
  int64_t dim, words, numbers, keys;
  Width(int64_t d, int64_t slots)
      : dim(d),
        words(round_up((d + A::PAIR - 1) / A::PAIR, A::WORDS)),
        numbers(words * A::PAIR),
        keys(std::min(PACKED, round_up(slots, CHUNK))) {}
};

// A row of `dim` numbers as words, whose rest is zero already.
inline void put_row(const float* from, int64_t dim, float* to) { std::memcpy(to, from, 4 * dim); }
inline void put_row(const Bfloat16* from, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d++) to[d] = wide(from[d]);
}
inline void put_row(const Bfloat16* from, int64_t dim, int32_t* to) { std::memcpy(to, from, 2 * dim); }

// `dim` float32 numbers times `share` as elements.
inline void narrow_row(const float* from, float share, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d++) to[d] = from[d] * share;
}
inline void narrow_row(const float* from, float share, int64_t dim, Bfloat16* to) {
  int64_t d = 0;
#ifdef MOBA_PAIRS
  for (; d + 2 * LANES <= dim; d += 2 * LANES) {
    const Floats first = load(from + d) * share, second = load(from + d + LANES) * share;
    store(to + d, _mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
#endif
  for (; d < dim; d++) narrow(from[d] * share, to[d]);
}

// Two rows of words of bfloat16, each number beside the one below it: `numbers` words.
inline void pair_rows(const int32_t* first, const int32_t* second, int64_t numbers, int32_t* to) {
  const uint16_t *a = reinterpret_cast<const uint16_t*>(first), *b = reinterpret_cast<const uint16_t*>(second);
  for (int64_t d = 0; d < numbers; d++) to[d] = static_cast<int32_t>(a[d] | static_cast<uint32_t>(b[d]) << 16);
}

inline void put_paired(const float* rows, int64_t step, int64_t count, int64_t numbers, float* to) {
  for (int64_t i = 0; i < count; i++) copy(rows + i * step, numbers, to + i * numbers);
}
inline void put_paired(const int32_t* rows, int64_t step, int64_t count, int64_t numbers, int32_t* to) {
  for (int64_t i = 0; i < count; i += 2) {
    pair_rows(rows + i * step, rows + (i + 1) * step, numbers, to + i / 2 * numbers);
  }
}

// 2 * LANES numbers as words of a row, from number `at` on.
MOBA_INLINE void put_numbers(Floats first, Floats second, int64_t at, float* row) {
  store(row + at, first);
  store(row + at + LANES, second);
}
#ifdef MOBA_PAIRS
MOBA_INLINE void put_numbers(Floats first, Floats second, int64_t at, int32_t* row) {
  store(row + at / 2, _mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

// The same numbers of two rows, side by side.
MOBA_INLINE void put_pairs(Floats first, Floats, int64_t at, float* row) { store(row + at, first); }
#ifdef MOBA_PAIRS
MOBA_INLINE void put_pairs(Floats first, Floats second, int64_t at, int32_t* row) {
  typedef int16_t Halves __attribute__((vector_size(64)));
  const Halves both = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  store(row + at, __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                          25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
}
#endif

// Keys, or values, laid out for products: as columns, `[chunk][words][STEP]`, and as rows, `[keys / PAIR][numbers]`.
template <class A>
class Laid {
 public:
  typedef typename A::Word Word;

  Laid(Room& room, Width<A> width, bool columns, bool rows)
      : width_(width),
        given_(room.take<Word>(width.keys * width.words)),
        columns_(columns ? room.take<Word>(width.keys / CHUNK * width.words * STEP) : nullptr),
        rows_(rows ? room.take<Word>(width.keys / A::PAIR * width.numbers) : nullptr) {}

  template <class Element>
  void lay(const Element* from, int64_t step, int64_t count) {
    const int64_t full = round_up(count, A::COLUMNS);
    const Word* rows = given_;
    int64_t rows_step = width_.words;
    if (sizeof(Word) == A::PAIR * sizeof(Element) && width_.dim == width_.numbers && count == full &&
        step % A::PAIR == 0) {  // words already, and nothing to fill up
      rows = reinterpret_cast<const Word*>(from);
      rows_step = step / A::PAIR;
    } else {
      for (int64_t i = 0; i < count; i++) put_row(from + i * step, width_.dim, given_ + i * width_.words);
      std::memset(given_ + count * width_.words, 0, (full - count) * width_.words * sizeof(Word));
    }
    for (int64_t at = 0; columns_ != nullptr && at < full; at += CHUNK) {
      const int64_t some = std::min(CHUNK, full - at);
      transpose(rows + at * rows_step, some, width_.words, rows_step, columns_ + at / CHUNK * width_.words * STEP,
                STEP);
    }
    if (rows_ != nullptr) put_paired(rows, rows_step, full, width_.numbers, rows_);
  }

  const Word* columns(int64_t at) const { return columns_ + at / CHUNK * width_.words * STEP; }
  const Word* rows(int64_t at) const { return rows_ + at / A::PAIR * width_.numbers; }

 private:
  Width<A> width_;
  Word *given_, *columns_, *rows_;
};

// Queries that read some of the keys in hand: rows of a piece, and how many of the first keys each may see.
struct Readers {
  const int32_t* rows;
  const int32_t* seen;
  int64_t count;
};

// The same for as many queries as arithmetic takes at once, from Readers of any number.
template <class A, class Do>
void by_tiles(const Readers& all, const Do& work) {
  for (int64_t at = 0; at < all.count; at += A::ROWS) {
    work(Readers{all.rows + at, all.seen + at, std::min<int64_t>(A::ROWS, all.count - at)});
  }
}

// Of the keys from `at` on, how many of one chunk the reader who sees most does.
inline int64_t widest(const Readers& some, int64_t at) {
  int64_t most = 0;
  for (int64_t i = 0; i < some.count; i++) most = std::max<int64_t>(most, some.seen[i] - at);
  return std::min(most, CHUNK);
}

// The first `seen` numbers of `x`, and `other` in the place of the rest.
MOBA_INLINE Floats visible(Floats x, int64_t seen, float other) {
  Ints number = {};
  for (int i = 0; i < LANES; i++) number[i] = i;
  return number < static_cast<int32_t>(seen) ? x : splat(other);
}

}  // namespace moba
