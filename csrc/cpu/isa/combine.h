// combine: y[t] = sum over k of weight * row, and its backward; each column's sum runs in k order.
// Bound by memory: a block of columns is kept in registers while the rows of one token pass, so that rows are read once
// and y is written once; in the backward a token's gradient stays in the cache while its rows pass. As rows begin
// anywhere, they are asked for ahead, and where a row ends, a row of the next token.
#pragma once

#include "cpu/isa/buffer.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

inline constexpr int kBlock = 4;                 // vectors of columns at a time
inline constexpr int64_t kBytesAhead = 8 << 10;  // asked for of all rows of a token together

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

// Asks for what will be read `distance` columns (at most a row) after col .. col + cols of the rows of one token.
template <class C, class S>
MOE_INLINE void fetch_rows(const Terms<C, S>& here, const Terms<C, S>& next, int64_t distance, int64_t hidden,
                           int64_t col, int64_t cols) {
  const bool own = col + distance < hidden;
  const Terms<C, S>& from = own ? here : next;
  const int64_t at = col + distance - (own ? 0 : hidden);
  for (int64_t i = 0; i < from.count; ++i) fetch_ahead<1>(from.terms[i].row + at, cols);
}

// y[col .. col + cols) of one token, for at most `vectors` vectors of columns.
template <int vectors, bool streamed, class C, class S>
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
  const int64_t distance = min(kBytesAhead / int64_t(sizeof(S)) / (p.width > 0 ? p.width : 1), p.hidden);
  Terms<C, S> terms[2]{Terms<C, S>(p.width), Terms<C, S>(p.width)};
  if (begin < end) terms[begin % 2].find(p, begin);
  for (int64_t token = begin; token < end; ++token) {
    const Terms<C, S>& here = terms[token % 2];
    Terms<C, S>& next = terms[(token + 1) % 2];
    if (token + 1 < end) next.find(p, token + 1);
    else next.count = 0;
    S* y = static_cast<S*>(p.y.data) + token * p.y.stride;
    int64_t col = 0;
    auto columns = [&]<int vectors>() __attribute__((always_inline)) {
      const int64_t cols = min(p.hidden - col, vectors * lanes);
      combine_columns<vectors, streamed>(here, y, col, cols);
      if (large) fetch_rows(here, next, distance, p.hidden, col, cols);
      col += cols;
    };
    while (col + kBlock * lanes <= p.hidden) columns.template operator()<kBlock>();
    while (col < p.hidden) columns.template operator()<1>();
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

inline constexpr int kSums = 4;  // of a dot product, side by side

// The rows of one token that are there, with what their backward needs.
template <class C, class S>
struct BackwardTerms {
  struct Term {
    const S* row;
    S* grad;
    C weight;
    int64_t slot;
    Vec<C> sum[kSums];  // of <grad_y, row>
  };

  explicit BackwardTerms(int64_t capacity) : terms(capacity) {}

  MOE_INLINE void find(const CombineBackwardParams& p, int64_t token) {
    count = 0;
    for (int64_t slot = token * p.width; slot < (token + 1) * p.width; ++slot) {
      const int64_t row = p.slot_row[slot];
      if (row < 0 || row >= p.num_rows || p.row_slot[row] != slot) continue;
      terms[count++] = {.row = p.rows ? static_cast<const S*>(p.rows.data) + row * p.rows.stride : nullptr,
                        .grad = p.grad_rows ? static_cast<S*>(p.grad_rows.data) + row * p.grad_rows.stride : nullptr,
                        .weight = p.weights ? read<C>(p.weights, slot) : C(1),
                        .slot = slot,
                        .sum = {}};
    }
  }

  Buffer<Term> terms;
  int64_t count = 0;
};

// Columns col .. col + cols of one row's gradient, weight * grad_y, and their share of the dot product.
template <bool rows, bool dot, bool streamed, class C, class S>
MOE_INLINE void combine_columns_backward(typename BackwardTerms<C, S>::Term& term, const S* grad_y, int64_t col,
                                         int64_t cols) {
  constexpr int64_t lanes = kLanes<C>;
  const Vec<C> scale = broadcast(term.weight);
  const S* row = dot ? term.row + col : nullptr;
  S* to = rows ? term.grad + col : nullptr;
  auto step = [&](int64_t i, Vec<C>& sum, int64_t n) __attribute__((always_inline)) {
    const Vec<C> grad = load<C>(grad_y + col + i, n);
    if constexpr (rows && streamed) stream_vector(to + i, from_compute<S, C>(scale * grad));
    else if constexpr (rows) store<C>(to + i, scale * grad, n);
    if constexpr (dot) sum += grad * load<C>(row + i, n);
  };
  Vec<C> sum[kSums];
  for (int s = 0; s < kSums; ++s) sum[s] = term.sum[s];
  int64_t i = 0;
  for (; i + kSums * lanes <= cols; i += kSums * lanes)
    for (int s = 0; s < kSums; ++s) step(i + s * lanes, sum[s], lanes);
  for (int s = 0; i < cols; i += lanes, ++s) step(i, sum[s], cols - i);
  for (int s = 0; s < kSums; ++s) term.sum[s] = sum[s];
}

template <bool rows, bool dot, bool streamed, class S>
void combine_rows_backward(const CombineBackwardParams& p, int64_t begin, int64_t end) {
  using C = Compute<S>;
  const int64_t block = 1024 / sizeof(S);
  const bool large = dot && p.num_rows * p.hidden * int64_t(sizeof(S)) >= kStreamedBytes;
  BackwardTerms<C, S> terms[2]{BackwardTerms<C, S>(p.width), BackwardTerms<C, S>(p.width)};
  if (begin < end) terms[begin % 2].find(p, begin);
  for (int64_t token = begin; token < end; ++token) {
    BackwardTerms<C, S>& here = terms[token % 2];
    BackwardTerms<C, S>& next = terms[(token + 1) % 2];
    if (token + 1 < end) next.find(p, token + 1);
    const int64_t ahead = large && token + 1 < end ? next.count : 0;
    const S* grad_y = static_cast<const S*>(p.grad_y.data) + token * p.grad_y.stride;
    for (int64_t col = 0; col < p.hidden; col += block) {
      const int64_t cols = p.hidden - col < block ? p.hidden - col : block;
      for (int64_t i = 0; i < here.count; ++i) {
        if (i < ahead) fetch_ahead<1>(next.terms[i].row + col, cols);
        combine_columns_backward<rows, dot, streamed, C, S>(here.terms[i], grad_y, col, cols);
      }
    }
    if constexpr (dot) {
      visit_dtype(p.weights.dtype, [&](auto* type) {
        auto* grad_weights = static_cast<decltype(type)>(p.grad_weights);
        for (int64_t k = 0; k < p.width; ++k) store<C>(grad_weights + token * p.width + k, Vec<C>{}, 1);
        for (int64_t i = 0; i < here.count; ++i) {
          const auto& sum = here.terms[i].sum;
          const C product = sum_lanes<C>((sum[0] + sum[1]) + (sum[2] + sum[3]));
          store<C>(grad_weights + here.terms[i].slot, broadcast(product), 1);
        }
      });
    }
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
