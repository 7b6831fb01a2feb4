// combine: y[t] = sum over k of weight * row, and its backward; each column's sum runs in k order.
// Bound by memory: a block of columns is kept in registers while the rows of one token pass, so that rows are read once
// and y is written once.
#pragma once

#include "cpu/isa/buffer.h"

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

// y[col .. col + cols) of one token, for at most `vectors` vectors of columns.
template <int vectors, class C, class S>
MOE_INLINE void combine_columns(const Terms<C, S>& from, S* y, int64_t col, int64_t cols) {
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
    if constexpr (vectors == 1) store<C>(y + col, sum[v], cols);
    else store<C>(y + col + v * kLanes<C>, sum[v]);
  }
}

template <class S>
void combine_rows(const CombineParams& p, int64_t begin, int64_t end) {
  using C = Compute<S>;
  constexpr int64_t lanes = kLanes<C>;
  Terms<C, S> terms(p.width);
  for (int64_t token = begin; token < end; ++token) {
    terms.find(p, token);
    S* y = static_cast<S*>(p.y.data) + token * p.y.stride;
    int64_t col = 0;
    for (; col + kBlock * lanes <= p.hidden; col += kBlock * lanes)
      combine_columns<kBlock>(terms, y, col, kBlock * lanes);
    for (; col < p.hidden; col += lanes) combine_columns<1>(terms, y, col, p.hidden - col);
  }
}

inline void combine(const CombineParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.rows.dtype, [&](auto* type) { combine_rows<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

// One row's gradient, weight * grad_y (to, if given), and the dot product of grad_y with that row (if given).
template <bool rows, bool dot, class C, class S>
MOE_INLINE C combine_row_backward(const S* grad_y, const S* row, C weight, S* to, int64_t hidden) {
  constexpr int64_t lanes = kLanes<C>;
  constexpr int chains = 4;
  Vec<C> sum[chains] = {};
  const Vec<C> scale = broadcast(weight);
  auto step = [&](int64_t col, int chain, int64_t cols) __attribute__((always_inline)) {
    Vec<C> grad = load<C>(grad_y + col, cols);
    if constexpr (rows) store<C>(to + col, scale * grad, cols);
    if constexpr (dot) sum[chain] += grad * load<C>(row + col, cols);
  };
  int64_t col = 0;
  for (; col + chains * lanes <= hidden; col += chains * lanes)
    for (int chain = 0; chain < chains; ++chain) step(col + chain * lanes, chain, lanes);
  for (int chain = 0; col < hidden; col += lanes, ++chain) step(col, chain, hidden - col);
  return dot ? sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3])) : C(0);
}

template <bool rows, bool dot, class S>
void combine_rows_backward(const CombineBackwardParams& p, int64_t begin, int64_t end) {
  using C = Compute<S>;
  for (int64_t r = begin; r < end; ++r) {
    int64_t slot = p.row_slot[r];
    S* to = rows ? static_cast<S*>(p.grad_rows.data) + r * p.grad_rows.stride : nullptr;
    if (slot < 0 || slot >= p.tokens * p.width || p.slot_row[slot] != r) {
      if constexpr (rows) std::memset(to, 0, p.hidden * sizeof(S));
      continue;
    }
    const S* grad_y = static_cast<const S*>(p.grad_y.data) + slot / p.width * p.grad_y.stride;
    const S* row = dot ? static_cast<const S*>(p.rows.data) + r * p.rows.stride : nullptr;
    C weight = p.weights ? read<C>(p.weights, slot) : C(1);
    C product = combine_row_backward<rows, dot>(grad_y, row, weight, to, p.hidden);
    if constexpr (dot) {
      visit_dtype(p.weights.dtype, [&](auto* type) {
        store<C>(static_cast<decltype(type)>(p.grad_weights) + slot, broadcast(product), 1);
      });
    }
  }
}

inline void combine_backward(const CombineBackwardParams& p, int64_t begin, int64_t end) {
  visit_dtype(p.grad_y.dtype, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if (p.grad_rows && p.grad_weights) combine_rows_backward<true, true, S>(p, begin, end);
    else if (p.grad_rows) combine_rows_backward<true, false, S>(p, begin, end);
    else if (p.grad_weights) combine_rows_backward<false, true, S>(p, begin, end);
  });
}

}  // namespace moe::MOE_ISA
