// A batch cut into pieces, which threads take one by one.

#pragma once

#include <algorithm>
#include <cstdint>

namespace moba {

// Some tokens of one key head's queries. Query g of its group at token t is row (t - begin) * group + g.
struct Piece {
  int64_t row, head, begin, end;

  int64_t tokens() const { return end - begin; }
};

// Tokens of a piece: enough pieces that no thread waits long for another, `least` to `most` rows in each.
template <class Batch>
int64_t cut_tokens(const Batch& batch, int64_t least, int64_t most) {
  constexpr int64_t PIECES = 4;  // for each thread
  const int64_t parts = std::max<int64_t>(1, PIECES * batch.threads / std::max<int64_t>(1, batch.batch * batch.heads));
  const int64_t tokens = (batch.tokens + parts - 1) / parts;
  return std::min(std::max(tokens, least / batch.group), std::max<int64_t>(1, most / batch.group));
}

// A batch cut by rows, key heads and tokens; the last tokens come first, since those who may read most do the most.
class Pieces {
 public:
  template <class Batch>
  Pieces(const Batch& batch, int64_t tokens)
      : heads_(batch.heads),
        all_heads_(batch.batch * batch.heads),
        all_tokens_(batch.tokens),
        tokens_(tokens),
        of_head_((batch.tokens + tokens - 1) / tokens) {}

  int64_t of_head() const { return of_head_; }
  int64_t count() const { return all_heads_ * of_head_; }

  Piece of(int64_t row, int64_t head, int64_t number) const {
    const int64_t part = of_head_ - 1 - number;
    return {row, head, part * tokens_, std::min(all_tokens_, (part + 1) * tokens_)};
  }

  Piece operator[](int64_t number) const {
    return of(number % all_heads_ / heads_, number % heads_, number / all_heads_);
  }

 private:
  int64_t heads_, all_heads_, all_tokens_, tokens_, of_head_;
};

}  // namespace moba
