// combine: y[t] = sum over k of weight * row, and its backward; each column's sum runs in k order.
// Bound by memory: a block of columns is kept in registers while the rows of one token pass, so that rows are read once
// and y is written once; in the backward a token's gradient stays in the cache while its rows pass. As rows begin
// anywhere, those of the next token are fetched meanwhile.
#pragma once

#include "cpu/isa/buffer.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

inline constexpr int kBlock = 8;  // vectors of columns at a time

// The rows of one token that are there, with their weights.
template <class C, class S>
struct Terms {
  struct Term {
    const S* row;
    C weight;
  };

  explicit Terms(int64_t capacity) : terms(capacity) {}

  MOE_INLINE void find(const CombineParams& p, int64_t token) {
    count = 0;
    for (int64_t slot = token * p.width; slot < (token + 1) * p.width; ++slot) {
      int64_t row = p.slot_row[slot];
      if (row < 0 || row >= p.num_rows) continue;
      terms[count++] = {static_cast<const S*>(p.rows.data) + row * p.rows.stride,
                        p.weights ? read<C>(p.weights, slot) : C(1)};
    }
  }

  Buffer<Term> terms;
  int64_t count = 0;
};

// y[col .. col + cols) of one token, for at most `vectors` vectors of columns; the first `ahead` rows of the next token
// are fetched.
template <int vectors, bool streamed, class C, class S>
MOE_INLINE void combine_columns(const Terms<C, S>& from, const Terms<C, S>& next, int64_t ahead, S* y, int64_t col,
                                int64_t cols) {
  for (int64_t i = 0; i < ahead; ++i)
    for (int64_t at = 0; at < cols * int64_t(sizeof(S)); at += kLine)
      fetch_ahead(reinterpret_cast<const char*>(next.terms[i].row + col) + at);
  Vec<C> sum[vectors] = {};
  for (int64_t i = 0; i < from.count; ++i) {
    const auto [row, weight] = from.terms[i];
    const Vec<C> scale = broadcast(weight);
    for (int v = 0; v < vectors; ++v) {
      int64_t at = v * kLanes<C>;
      sum[v] += scale * (vectors == 1 ? load<C>(row + col, cols) : load<C>(row + col + at));
    }
  }
  for (int v = 0; v < vectors; ++v) {
    if constexpr (streamed) stream_vector(y + col + v * kLanes<C>, from_compute<S, C>(sum[v]));
    else if constexpr (vectors == 1) store<C>(y + col, sum[v], cols);
    else store<C>(y + col + v * kLanes<C>, sum[v]);
  }
}

template <class S, bool streamed>
void combine_rows(const CombineParams& p, int64_t begin, int64_t end) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  const bool large = p.num_rows * p.hidden * int64_t(sizeof(S)) >= kStreamedBytes;
  Terms<C, S> terms[2]{Terms<C, S>(p.width), Terms<C, S>(p.width)};
  if (begin < end) terms[begin % 2].find(p, begin);
  for (int64_t token = begin; token < end; ++token) {
    const Terms<C, S>& here = terms[token % 2];
    Terms<C, S>& next = terms[(token + 1) % 2];
    if (token + 1 < end) next.find(p, token + 1);
    const int64_t ahead = large && token + 1 < end ? next.count : 0;
    S* y = static_cast<S*>(p.y.data) + token * p.y.stride;
    int64_t col = 0;
    for (; col + kBlock * lanes <= p.hidden; col += kBlock * lanes)
      combine_columns<kBlock, streamed>(here, next, ahead, y, col, kBlock * lanes);
    for (; col < p.hidden; col += lanes) combine_columns<1, streamed>(here, next, ahead, y, col, p.hidden - col);
  }
  if constexpr (streamed) end_of_stream();
}

inline void combine(const CombineParams& p, int64_t begin, int64_t end) {
  const bool streamed = is_streamed(p.y.data, p.tokens, p.y.stride * size_of(p.y.dtype));
  visit_dtype(p.rows.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (streamed) combine_rows<S, true>(p, begin, end);
    else combine_rows<S, false>(p, begin, end);
  });
}

// One row's gradient, weight * grad_y (to, if given), and the dot product of grad_y with that row (if given); `next` is
// fetched.
template <bool rows, bool dot, bool streamed, class C, class S>
MOE_INLINE C combine_row_backward(const S* grad_y, const S* row, const S* next, C weight, S* to, int64_t hidden) {
  constexpr int64_t lanes = kLanes<C>;
  constexpr int chains = 4;
  Vec<C> sum[chains] = {};
  const Vec<C> scale = broadcast(weight);
  auto step = [&](int64_t col, int chain, int64_t cols) __attribute__((always_inline)) {
    Vec<C> grad = load<C>(grad_y + col, cols);
    if constexpr (rows && streamed) stream_vector(to + col, from_compute<S, C>(scale * grad));
    else if constexpr (rows) store<C>(to + col, scale * grad, cols);
    if constexpr (dot) sum[chain] += grad * load<C>(row + col, cols);
  };
  int64_t col = 0;
  for (; col + chains * lanes <= hidden; col += chains * lanes) {
    for (int64_t at = 0; dot && at < chains * lanes * int64_t(sizeof(S)); at += kLine)
      fetch_ahead(reinterpret_cast<const char*>(next + col) + at);
    for (int chain = 0; chain < chains; ++chain) step(col + chain * lanes, chain, lanes);
  }
  for (int chain = 0; col < hidden; col += lanes, ++chain) step(col, chain, hidden - col);
  return dot ? sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) : C(0);
}

template <bool rows, bool dot, bool streamed, class S>
void combine_rows_backward(const CombineBackwardParams& p, int64_t begin, int64_t end) {
  using C = Compute<S>;
  auto row_of = [&](int64_t slot) -> int64_t {  // -1 where the slot is dropped
    const int64_t row = p.slot_row[slot];
    return row >= 0 && row < p.num_rows && p.row_slot[row] == slot ? row : -1;
  };
  auto find = [&](int64_t row) { return static_cast<const S*>(p.rows.data) + row * p.rows.stride; };
  auto set_grad_weight = [&](int64_t slot, C value) {
    visit_dtype(p.weights.dtype,
                [&](auto* type) { store<C>(static_cast<decltype(type)>(p.grad_weights) + slot, broadcast(value), 1); });
  };
  for (int64_t slot = begin * p.width; slot < end * p.width; ++slot) {
    const int64_t r = row_of(slot);
    if (r < 0) {
      if constexpr (dot) set_grad_weight(slot, C(0));
      continue;
    }
    const S* grad_y = static_cast<const S*>(p.grad_y.data) + slot / p.width * p.grad_y.stride;
    const int64_t next = slot + 1 < end * p.width ? row_of(slot + 1) : -1;
    S* to = rows ? static_cast<S*>(p.grad_rows.data) + r * p.grad_rows.stride : nullptr;
    const C weight = p.weights ? read<C>(p.weights, slot) : C(1);
    const C product = combine_row_backward<rows, dot, streamed>(
        grad_y, dot ? find(r) : nullptr, dot ? find(next < 0 ? r : next) : nullptr, weight, to, p.hidden);
    if constexpr (dot) set_grad_weight(slot, product);
  }
  if constexpr (streamed) end_of_stream();
}

inline void combine_backward(const CombineBackwardParams& p, int64_t begin, int64_t end) {
  const bool streamed =
      p.grad_rows && is_streamed(p.grad_rows.data, p.num_rows, p.grad_rows.stride * size_of(p.grad_y.dtype));
  visit_dtype(p.grad_y.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (!p.grad_rows) combine_rows_backward<false, true, false, S>(p, begin, end);
    else if (p.grad_weights && streamed) combine_rows_backward<true, true, true, S>(p, begin, end);
    else if (p.grad_weights) combine_rows_backward<true, true, false, S>(p, begin, end);
    else if (streamed) combine_rows_backward<true, false, true, S>(p, begin, end);
    else combine_rows_backward<true, false, false, S>(p, begin, end);
  });
}

}  // namespace moe::MOE_ISA
