// Which keys the queries of a piece read, in an order that lays every key out once.

#pragma once

#include <vector>

#include "attention.h"
#include "clock.h"
#include "laid.h"
#include "pieces.h"

namespace moba {

class Walk {
 public:
  // Calls `lay(slot, count)` for runs of keys, and after each `read(readers)` for those who see some of them.
  template <class Work>
  void operator()(const Batch& batch, const Piece& piece, Work& work, Clock& clock) {
    clock.only(OWN);
    own(batch, piece, work);
    clock.only(STAGES);
    if (batch.reads == 0 || batch.blocks == 0) return;
    clock.to(SORT);
    if (batch.index_bytes == 2) {
      sort(batch, piece, static_cast<const int16_t*>(batch.index));
    } else {
      sort(batch, piece, static_cast<const int32_t*>(batch.index));
    }
    routed(batch, piece, work);
  }

 private:
  // Own blocks, or own documents: every query reads them up to itself.
  template <class Work>
  void own(const Batch& batch, const Piece& piece, Work& work) {
    const int32_t* doc = batch.doc + piece.row * batch.doc_at + batch.first;  // of tokens from here on
    const int32_t* pos = batch.pos + piece.row * batch.pos_at + batch.first;
    for (int64_t begin = piece.begin, end; begin < piece.end; begin = end) {
      end = begin + 1;
      if (doc[begin] < 0) continue;
      const int64_t told = batch.block_size ? pos[begin] % batch.block_size : pos[begin];
      const int64_t before = std::min(told, batch.first + begin);  // no memory before the row's, whoever told what
      const int64_t most = batch.block_size ? begin - before + batch.block_size : piece.end;
      while (end < piece.end && end < most && doc[end] == doc[begin]) end++;
      const int64_t last = batch.first + end;  // the slot after it
      for (int64_t slot = batch.first + begin - before; slot < last; slot += PACKED) {
        const int64_t count = std::min(PACKED, last - slot);
        rows_.clear();
        seen_.clear();
        for (int64_t t = std::max(begin, slot - batch.first); t < end; t++) {
          for (int64_t g = 0; g < batch.group; g++) {
            rows_.push_back(static_cast<int32_t>((t - piece.begin) * batch.group + g));
            seen_.push_back(static_cast<int32_t>(std::min(count, batch.first + t - slot + 1)));
          }
        }
        work.lay(slot, count);
        work.read(Readers{rows_.data(), seen_.data(), static_cast<int64_t>(rows_.size())});
      }
    }
  }

  // Rows in order of the blocks that they read, ascending inside one: a counting sort.
  template <class Index>
  void sort(const Batch& batch, const Piece& piece, const Index* index) {
    const int32_t* doc = batch.doc + piece.row * batch.doc_at + batch.first;
    edges_.assign(batch.blocks + 1, 0);
    for (int pass = 0; pass < 2; pass++) {
      for (int64_t t = piece.begin; t < piece.end; t++) {
        if (doc[t] < 0) continue;
        for (int64_t g = 0; g < batch.group; g++) {
          const Index* chosen = index + (batch.query_head(piece.row, piece.head, g) * batch.tokens + t) * batch.reads;
          const int32_t row = static_cast<int32_t>((t - piece.begin) * batch.group + g);
          for (int64_t i = 0; i < batch.reads; i++) {
            const int64_t block = chosen[i];
            if (block < 0 || block >= batch.blocks) continue;
            if (pass == 0) {
              edges_[block + 1]++;
            } else {
              sorted_[next_[block]++] = row;
            }
          }
        }
      }
      if (pass == 0) {
        for (int64_t block = 0; block < batch.blocks; block++) edges_[block + 1] += edges_[block];
        next_ = edges_;
        sorted_.resize(edges_.back());
      }
    }
  }

  // Other blocks, each read whole by those who chose it.
  template <class Work>
  void routed(const Batch& batch, const Piece& piece, Work& work) {
    const int32_t* start = batch.start + piece.row * batch.start_at;
    for (int64_t block = 0; block < batch.blocks; block++) {
      const int64_t readers = edges_[block + 1] - edges_[block];
      if (readers == 0) continue;
      for (int64_t at = 0; at < batch.block_size; at += PACKED) {
        const int64_t count = std::min(PACKED, batch.block_size - at);
        seen_.assign(readers, static_cast<int32_t>(count));
        work.lay(start[block] + at, count);
        work.read(Readers{sorted_.data() + edges_[block], seen_.data(), readers});
      }
    }
  }

  std::vector<int32_t> rows_, seen_, sorted_;
  std::vector<int64_t> edges_, next_;
};

}  // namespace moba
