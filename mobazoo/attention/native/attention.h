// What Python hands over: `_Batch` in kernels/cpu_compiled.py, field for field.

#pragma once

#include <cstdint>

namespace moba {

struct Strides {
  int64_t row, head, token;  // in numbers; those of a token lie together
};

template <class Element>
const Element* place(const void* from, const Strides& at, int64_t row, int64_t head, int64_t token) {
  return static_cast<const Element*>(from) + row * at.row + head * at.head + token * at.token;
}

struct Batch {
  const void *q, *k, *v, *dout;  // [B, Hq or Hkv, T or S, D]
  void *out, *dq;                // [B, Hq, T, D], contiguous; the backward reads `out`
  float* lse;                    // [B, Hq, T]; the backward reads it
  void *dk, *dv;                 // [parts, B, Hkv, S, D], contiguous; float32 where there are several parts
  const int32_t *doc, *pos;      // [B, S]; padding is document -1
  const void* index;             // [B, Hq, T, reads], contiguous; entries below 0 are empty
  const int32_t* start;          // [B, blocks]
  double* spent;                 // [STAGES] seconds by stage are added here, on one thread; null: nobody asks
  Strides q_at, k_at, v_at, dout_at;
  int64_t doc_at, pos_at, start_at;  // from row to row
  int64_t batch, heads, group, tokens, slots, dim, first, block_size, blocks, reads, index_bytes, parts, threads;
  double scale;

  int64_t query_head(int64_t row, int64_t head, int64_t g) const { return (row * heads + head) * group + g; }
};

}  // namespace moba
