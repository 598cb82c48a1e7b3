// Products of bfloat16 by the tiles of Intel's AMX: 16 rows of 64 bytes each.

#pragma once

#include "products.h"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(MOBA_PAIRS) && defined(__linux__)
#define MOBA_AMX

#include <sys/syscall.h>
#include <unistd.h>

namespace moba {

struct Tiled : Pairs {
  static constexpr int ROWS = 64;     // queries of a tile
  static constexpr int SCORED = 16;   // of them, those whose scores are made at once, and stay in the nearest cache
  static constexpr int WORDS = 16;    // words of a row are multiples of a tile's
  static constexpr int COLUMNS = 32;  // and columns of a product of two tiles'
  static constexpr int DEPTH = 32;    // and rows that a product sums over
  static constexpr bool TURNED = true;

  // Whether the system lets this process use tiles.
  static bool able() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return allowed;
  }

  static void begin() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
  }

  static void end() { _tile_release(); }

  template <bool FRESH>
  static void multiply(int64_t rows, const Word* a, int64_t a_row, int64_t, const Word* b, int64_t b_step,
                       int64_t depth, int64_t columns, float* c, int64_t c_step) {
    for (int64_t j = 0; j < columns; j += COLUMNS) {
      int64_t i = 0;
      for (; i + 16 < rows; i += 32) {
        product<FRESH, true>(a + i * a_row, a_row * 4, b + j, b_step * 4, depth, c + i * c_step + j, c_step);
      }
      if (i < rows) {
        product<FRESH, false>(a + i * a_row, a_row * 4, b + j, b_step * 4, depth, c + i * c_step + j, c_step);
      }
    }
  }

 private:
  // c [32 or 16, 32] (+)= a b: tiles 0 to 3 are c's, 4 and 5 a's, 6 and 7 b's.
  template <bool FRESH, bool TWO>
  static inline void product(const Word* a, int64_t a_bytes, const Word* b, int64_t b_bytes, int64_t depth, float* c,
                             int64_t c_step) {
    const int64_t c_bytes = c_step * 4;
    float* low = c + 16 * c_step;
    if constexpr (FRESH) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (TWO) _tile_zero(2);
      if constexpr (TWO) _tile_zero(3);
    } else {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      if constexpr (TWO) _tile_loadd(2, low, c_bytes);
      if constexpr (TWO) _tile_loadd(3, low + 16, c_bytes);
    }
    for (int64_t k = 0; k < depth; k += WORDS) {
      const Word* right = b + k * b_bytes / 4;
      _tile_loadd(4, a + k, a_bytes);
      _tile_loadd(6, right, b_bytes);
      _tile_loadd(7, right + 16, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (TWO) {
        _tile_loadd(5, a + k + 16 * a_bytes / 4, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    if constexpr (TWO) _tile_stored(2, low, c_bytes);
    if constexpr (TWO) _tile_stored(3, low + 16, c_bytes);
  }
};

}  // namespace moba

#endif
