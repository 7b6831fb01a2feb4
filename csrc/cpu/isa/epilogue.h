// What happens to a tile of products before it is stored. A tile is [rows, kTileCols] of accumulators; where the
// activation is gated, the gates stand in its first half and the ups of the same inner columns in its second.
#pragma once

#include "cpu/isa/math.h"
#include "cpu/isa/pack.h"
#include "stages/activation.h"

namespace moe::MOE_ISA {

template <class C_>
struct LaneMath {
  using C = C_;
  using V = Vec<C>;
  static MOE_INLINE V constant(double value) { return broadcast(C(value)); }
  static constexpr bool has_tanh = true;
  static MOE_INLINE V tanh(V x) { return MOE_ISA::tanh<C>(x); }
  static MOE_INLINE V sigmoid(V x) { return MOE_ISA::sigmoid<C>(x); }
  static MOE_INLINE Normal<LaneMath> normal(V x) {
    return {C(0.5) * (C(1) + MOE_ISA::erf<C>(x * C(0.70710678118654752440))),
            C(0.39894228040143267794) * MOE_ISA::exp<C>(C(-0.5) * x * x)};
  }
  template <class Mask>
  static MOE_INLINE V select(Mask mask, V a, V b) {
    return mask ? a : b;
  }
};

// Where the gate and the up of inner column i stand among the weights' rows.
struct InnerColumns {
  int64_t gate, up, step;
};

inline InnerColumns inner_columns(const Activation& activation, int64_t i, int64_t inner) {
  if (!activation.gated) return {i, i, 1};
  return activation.interleaved ? InnerColumns{2 * i, 2 * i + 1, 2} : InnerColumns{i, inner + i, 1};
}

template <class C>
struct GateAndUp {
  Vec<C> gate, up;
};

// The gates and ups of two vectors in which they alternate.
template <class C>
MOE_INLINE GateAndUp<C> deinterleave(Vec<C> first, Vec<C> second) {
  constexpr std::make_integer_sequence<int, kLanes<C>> each;
  return {every_second<C, 0>(first, second, each), every_second<C, 1>(first, second, each)};
}

// Of a row of pre-activations or of their gradients: the gates and the ups of the inner columns from j on, n of them.
template <class C, class S>
MOE_INLINE GateAndUp<C> load_gate_and_up(const S* row, InnerColumns at, int64_t j, int64_t n) {
  if (at.step == 1) return {load<C>(row + at.gate + j, n), load<C>(row + at.up + j, n)};
  constexpr int lanes = kLanes<C>;
  const S* from = row + at.gate + 2 * j;
  return deinterleave<C>(load<C>(from, 2 * n), load<C>(from + lanes, 2 * n - lanes));
}

template <class C, class S>
MOE_INLINE void store_gate_and_up(S* row, InnerColumns at, int64_t j, GateAndUp<C> values, int64_t n) {
  if (at.step == 1) {
    store<C>(row + at.gate + j, values.gate, n);
    if (at.up != at.gate) store<C>(row + at.up + j, values.up, n);  // a plain activation has gates alone
    return;
  }
  constexpr int lanes = kLanes<C>;
  constexpr std::make_integer_sequence<int, lanes> each;
  S* const to = row + at.gate + 2 * j;
  store<C>(to, alternating<C, 0>(values.gate, values.up, each), 2 * n);
  if (2 * n > lanes) store<C>(to + lanes, alternating<C, 1>(values.gate, values.up, each), 2 * n - lanes);
}

// A run of an expert's biases: begin, begin + step, ...
struct Columns {
  int64_t begin, step, count;
};

// The biases of the tile's expert, or zeros.
template <class C>
void read_bias(const Vector& bias, int64_t expert, int64_t n, Columns columns, C* to) {
  for (int64_t j = 0; j < columns.count; ++j)
    to[j] = bias ? read<C>(bias, expert * n + columns.begin + j * columns.step) : C(0);
}

template <class S>
S* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<S*>(matrix.data) + row * matrix.stride;
}

template <class S, class C>
void store_tile(const GroupedGemmParams& p, const Tile& tile, const C* values) {
  constexpr int lanes = kLanes<C>;
  C bias[kTileCols];
  read_bias(p.bias, tile.expert, p.n, {tile.col_begin, 1, tile.cols}, bias);
  for (int64_t i = 0; i < tile.rows; ++i, values += kTileCols) {
    S* out = row_of<S>(p.out, tile.row_begin + i) + tile.col_begin;
    for (int64_t j = 0; j < tile.cols; j += lanes)
      store<C>(out + j, load<C>(values + j) + load<C>(bias + j), tile.cols - j);
  }
}

// Rows in which gates and ups alternate get the gates in their first half and the ups in their second.
template <class C>
void deinterleave_tile(int64_t rows, int64_t cols, C* tile) {
  constexpr int lanes = kLanes<C>;
  for (int64_t row = 0; row < rows; ++row, tile += kTileCols) {
    C ups[kTileCols / 2];
    for (int64_t j = 0; j < cols; j += lanes) {
      const auto values = deinterleave<C>(load_vector<C>(tile + 2 * j), load_vector<C>(tile + 2 * j + lanes));
      store_vector(tile + j, values.gate);
      store_vector(ups + j, values.up);
    }
    std::memcpy(tile + kTileCols / 2, ups, cols * sizeof(C));
  }
}

template <class S, class C>
void activate_tile(const GroupedGemmParams& p, const Tile& tile, const C* values) {
  constexpr int lanes = kLanes<C>, half = kTileCols / 2;
  const bool gated = p.activation.gated;
  const int64_t inner = gated ? p.n / 2 : p.n;
  const InnerColumns at = inner_columns(p.activation, tile.col_begin, inner);
  C bias[kTileCols] = {};
  read_bias(p.bias, tile.expert, p.n, {at.gate, at.step, tile.cols}, bias);
  if (gated) read_bias(p.bias, tile.expert, p.n, {at.up, at.step, tile.cols}, bias + half);
  for (int64_t i = 0; i < tile.rows; ++i, values += kTileCols) {
    S* out = row_of<S>(p.out, tile.row_begin + i) + tile.col_begin;
    S* pre = p.pre ? row_of<S>(p.pre, tile.row_begin + i) : nullptr;
    for (int64_t j = 0; j < tile.cols; j += lanes) {
      const int64_t n = tile.cols - j;
      const auto gate = load<C>(values + j) + load<C>(bias + j);
      const auto up = gated ? load<C>(values + half + j) + load<C>(bias + half + j) : gate;
      if (pre) store_gate_and_up<C>(pre, at, j, {gate, up}, n);
      store<C>(out + j, ActivationMath<LaneMath<C>>::forward(p.activation, gate, up), n);
    }
  }
}

// values is dA' [rows, inner columns], before the route weight s: dH = s * dA' * act'(H), out = s * A; share += the
// product of dA' and A.
template <class S, class C>
void activate_backward_tile(const GroupedGemmParams& p, const Tile& tile, const C* values, C* share,
                            int64_t share_stride) {
  constexpr int lanes = kLanes<C>;
  const InnerColumns at = inner_columns(p.activation, tile.col_begin, p.n);
  for (int64_t i = 0; i < tile.rows; ++i, values += kTileCols) {
    const int64_t row = tile.row_begin + i;
    const S* pre = row_of<S>(p.pre, row);
    S* grad_pre = row_of<S>(p.grad_pre, row);
    S* out = row_of<S>(p.out, row) + tile.col_begin;
    const C score = p.score ? read<C>(p.score, slot_of(p.a, row)) : C(1);
    Vec<C> sum{};
    for (int64_t j = 0; j < tile.cols; j += lanes) {
      const int64_t n = tile.cols - j;
      const auto [gate, up] = load_gate_and_up<C>(pre, at, j, n);
      const auto grad = load<C>(values + j, n) + C(0);  // -0 as +0: few rows add zeros behind the last value
      const auto g = ActivationMath<LaneMath<C>>::backward(p.activation, gate, up, broadcast(score) * grad);
      sum = sum + grad * g.value;
      store<C>(out + j, broadcast(score) * g.value, n);
      store_gate_and_up<C>(grad_pre, at, j, {g.gate, g.up}, n);
    }
    if (share) share[row * share_stride] += sum_lanes<C>(sum);
  }
}

}  // namespace moe::MOE_ISA
