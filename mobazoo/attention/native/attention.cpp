// Attention of whole batches on a CPU, full or by blocks.

#include "attention.h"

#include "backward.h"
#include "dispatch.h"
#include "forward.h"
#include "threads.h"
#include "walk.h"

namespace moba {
namespace {

// Rows of a piece: what its queries know should stay in the cache of a core, and many should read a block that is laid
// out for them.
constexpr int64_t MOST = 8192, LEAST = 512, MOST_BACK = 16384;

int64_t tokens_of_piece(const Batch& batch) {
  int64_t tokens = cut_tokens(batch, LEAST, MOST);
  if (batch.block_size && batch.block_size < tokens) tokens = tokens / batch.block_size * batch.block_size;
  return std::max<int64_t>(1, tokens);
}

// Queries of a piece, and what comes of them.
template <class A, class Element>
class ForwardWork {
 public:
  ForwardWork(const Batch& batch, int64_t tokens)
      : batch_(batch),
        width_(batch.dim, batch.slots),
        rows_(tokens * batch.group),
        clock_(batch.spent),
        tiles_(room_, width_, static_cast<float>(batch.scale), clock_),
        known_{room_.take<typename A::Word>(rows_ * width_.words), room_.take<float>(rows_ * width_.numbers, false),
               room_.take<float>(rows_), room_.take<float>(rows_)} {}

  void operator()(const Piece& piece) {
    begin(piece);
    walk_(batch_, piece, *this, clock_);
    end(piece);
    clock_.to(REST);
  }

  void lay(int64_t slot, int64_t count) {
    tiles_.lay(place<Element>(batch_.k, batch_.k_at, piece_.row, piece_.head, slot), batch_.k_at.token,
               place<Element>(batch_.v, batch_.v_at, piece_.row, piece_.head, slot), batch_.v_at.token, count);
  }

  void read(const Readers& all) { tiles_.read(all, known_); }

 private:
  void begin(const Piece& piece) {
    clock_.to(REST);
    piece_ = piece;
    const int64_t rows = piece.tokens() * batch_.group;
    for (int64_t g = 0; g < batch_.group; g++) {
      const Element* from =
          place<Element>(batch_.q, batch_.q_at, piece.row, piece.head * batch_.group + g, piece.begin);
      for (int64_t t = 0; t < piece.tokens(); t++) {
        put_row(from + t * batch_.q_at.token, batch_.dim, known_.queries + (t * batch_.group + g) * width_.words);
      }
    }
    std::memset(known_.sums, 0, rows * width_.numbers * sizeof(float));
    std::fill_n(known_.top, rows, -INFINITE);
    std::fill_n(known_.total, rows, 0.0f);
  }

  void end(const Piece& piece) {
    clock_.to(REST);
    Element* out = static_cast<Element*>(batch_.out);
    for (int64_t g = 0; g < batch_.group; g++) {
      const int64_t at = batch_.query_head(piece.row, piece.head, g) * batch_.tokens + piece.begin;
      for (int64_t t = 0; t < piece.tokens(); t++) {
        const int64_t row = t * batch_.group + g;
        const float total = known_.total[row], share = total == 0 ? 0.0f : 1 / total;
        const float* sums = known_.sums + row * width_.numbers;
        narrow_row(sums, share, batch_.dim, out + (at + t) * batch_.dim);
        batch_.lse[at + t] = rounded(known_.top[row] * static_cast<float>(batch_.scale)) + std::log(total);
      }
    }
  }

  const Batch& batch_;
  Room room_;
  Width<A> width_;
  int64_t rows_;
  Clock clock_;
  Forward<A> tiles_;
  Running<A> known_;
  Walk walk_;
  Piece piece_{};
};

template <class A, class Element>
void forward(const Batch& batch) {
  const int64_t tokens = tokens_of_piece(batch);
  const Pieces pieces(batch, tokens);
  Queue queue(pieces.count());
  together(std::min(batch.threads, pieces.count()), [&] {
    int64_t number;
    if (!queue.next(number)) return;
    ForwardWork<A, Element> work(batch, std::min(tokens, batch.tokens));
    const Flushed flushed;
    A::begin();
    do work(pieces[number]);
    while (queue.next(number));
    A::end();
  });
}

template <class A, class Element>
class BackwardWork {
 public:
  BackwardWork(const Batch& batch, int64_t tokens)
      : batch_(batch),
        width_(batch.dim, batch.slots),
        clock_(batch.spent),
        tiles_(room_, width_, static_cast<float>(batch.scale), clock_),
        in_place_(batch.parts > 1 || sizeof(Element) == sizeof(float)) {
    const int64_t rows = tokens * batch.group;
    if (!in_place_) {
      dk_ = room_.take<float>(batch.slots * batch.dim);
      dv_ = room_.take<float>(batch.slots * batch.dim);
    }
    given_ = {room_.take<typename A::Word>(rows * width_.words), room_.take<typename A::Word>(rows * width_.words),
              room_.take<float>(rows), room_.take<float>(rows), room_.take<float>(rows * width_.numbers)};
  }

  // The pieces `part`, `part + parts`, ... of a key head, whose sums are one of `parts`.
  void operator()(const Pieces& pieces, int64_t row, int64_t head, int64_t part) {
    const int64_t sums = batch_.slots * batch_.dim;
    const int64_t place = ((part * batch_.batch + row) * batch_.heads + head) * sums;
    if (in_place_) {
      dk_ = static_cast<float*>(batch_.dk) + place;
      dv_ = static_cast<float*>(batch_.dv) + place;
    }
    std::memset(dk_, 0, sums * sizeof(float));
    std::memset(dv_, 0, sums * sizeof(float));
    for (int64_t number = part; number < pieces.of_head(); number += batch_.parts) {
      piece_ = pieces.of(row, head, number);
      begin();
      walk_(batch_, piece_, *this, clock_);
      end();
    }
    if (!in_place_) {
      narrow_row(dk_, 1.0f, sums, static_cast<Element*>(batch_.dk) + place);
      narrow_row(dv_, 1.0f, sums, static_cast<Element*>(batch_.dv) + place);
    }
  }

  void lay(int64_t slot, int64_t count) {
    tiles_.lay(place<Element>(batch_.k, batch_.k_at, piece_.row, piece_.head, slot), batch_.k_at.token,
               place<Element>(batch_.v, batch_.v_at, piece_.row, piece_.head, slot), batch_.v_at.token, count);
    slot_ = slot;
    count_ = count;
  }

  void read(const Readers& all) {
    tiles_.read(all, given_);
    tiles_.collect(count_, dk_ + slot_ * batch_.dim, dv_ + slot_ * batch_.dim);
  }

 private:
  void begin() {
    clock_.to(REST);
    const int64_t dim = batch_.dim;
    for (int64_t g = 0; g < batch_.group; g++) {
      const int64_t head = piece_.head * batch_.group + g;
      const Element* q = place<Element>(batch_.q, batch_.q_at, piece_.row, head, piece_.begin);
      const Element* dout = place<Element>(batch_.dout, batch_.dout_at, piece_.row, head, piece_.begin);
      const int64_t at = batch_.query_head(piece_.row, piece_.head, g) * batch_.tokens + piece_.begin;
      const Element* out = static_cast<const Element*>(batch_.out) + at * dim;
      for (int64_t t = 0; t < piece_.tokens(); t++) {
        const int64_t row = t * batch_.group + g;
        put_row(q + t * batch_.q_at.token, dim, given_.queries + row * width_.words);
        put_row(dout + t * batch_.dout_at.token, dim, given_.douts + row * width_.words);
        given_.lse[row] = batch_.lse[at + t];
        float delta = 0;
        for (int64_t d = 0; d < dim; d++) delta += wide(dout[t * batch_.dout_at.token + d]) * wide(out[t * dim + d]);
        given_.delta[row] = delta;
      }
    }
    std::memset(given_.dq, 0, piece_.tokens() * batch_.group * width_.numbers * sizeof(float));
  }

  void end() {
    clock_.to(REST);
    for (int64_t g = 0; g < batch_.group; g++) {
      const int64_t at = batch_.query_head(piece_.row, piece_.head, g) * batch_.tokens + piece_.begin;
      Element* to = static_cast<Element*>(batch_.dq) + at * batch_.dim;
      for (int64_t t = 0; t < piece_.tokens(); t++) {
        const float* from = given_.dq + (t * batch_.group + g) * width_.numbers;
        narrow_row(from, 1.0f, batch_.dim, to + t * batch_.dim);
      }
    }
  }

  const Batch& batch_;
  Room room_;
  Width<A> width_;
  Clock clock_;
  Backward<A> tiles_;
  const bool in_place_;                  // gradients of keys are summed where they go
  float *dk_ = nullptr, *dv_ = nullptr;  // [slots, dim], of the key head in hand
  Given<A> given_;
  Walk walk_;
  Piece piece_{};
  int64_t slot_ = 0, count_ = 0;
};

template <class A, class Element>
void backward(const Batch& batch) {
  const int64_t tokens = batch.parts > 1 ? cut_tokens(batch, LEAST, MOST_BACK / batch.parts)
                                         : std::max<int64_t>(1, std::min(batch.tokens, MOST_BACK / batch.group));
  const Pieces pieces(batch, tokens);
  const int64_t heads = batch.batch * batch.heads, count = heads * batch.parts;
  Queue queue(count);
  together(std::min(batch.threads, count), [&] {
    int64_t number;
    if (!queue.next(number)) return;
    BackwardWork<A, Element> work(batch, tokens);
    const Flushed flushed;
    A::begin();
    do work(pieces, number % heads / batch.heads, number % batch.heads, number / heads);
    while (queue.next(number));
    A::end();
  });
}

}  // namespace
}  // namespace moba

extern "C" {

// `narrow` as dispatch.h has it.
int64_t moba_forward(const moba::Batch* batch, int64_t narrow) {
  return moba::dispatch(
      narrow, [&](auto arithmetic, auto element) { moba::forward<decltype(arithmetic), decltype(element)>(*batch); });
}

int64_t moba_backward(const moba::Batch* batch, int64_t narrow) {
  return moba::dispatch(
      narrow, [&](auto arithmetic, auto element) { moba::backward<decltype(arithmetic), decltype(element)>(*batch); });
}

}  // extern "C"
