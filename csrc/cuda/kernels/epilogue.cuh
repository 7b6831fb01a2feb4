// What happens to a tile of products before it is stored. The products [rows, cols] stand in shared memory as floats; a
// warp takes a row at a time and a lane two neighbouring columns of the result, so that whole lines are stored. Where
// the activation is gated, gates stand in the first half of a row and the ups of the same inner columns in the second,
// or, interleaved, side by side.
#pragma once

#include "cuda/arch/memory.cuh"
#include "cuda/kernels/activation_math.cuh"
#include "cuda/kernels/gemm_operands.cuh"
#include "cuda/kernels/warp.cuh"

namespace moe {

// A tile of products, biases added.
template <int rows, int cols>
struct Products {
  // So that what the lanes of a warp store at once lies in different banks: neighbouring columns of several rows, or,
  // where there are 64 columns, every eighth pair.
  static constexpr int kStride = cols + (cols == 64 ? 2 : 8);
  float values[rows * kStride];

  MOE_INLINE float* at(int row, int col) { return values + row * kStride + col; }
  MOE_INLINE float2 pair(int row, int col) const { return arch::load<float2>(values + row * kStride + col); }
};

// Rows of a matrix, read and written by twos.
template <class T>
class PairRows {
 public:
  // `offset`: where a second run of columns begins.
  MOE_INLINE PairRows(const Matrix& matrix, int64_t offset = 0)
      : data_(static_cast<T*>(matrix.data)),
        stride_(matrix.stride),
        aligned_(reinterpret_cast<uintptr_t>(matrix.data) % (2 * sizeof(T)) == 0 && (matrix.stride | offset) % 2 == 0) {
  }

  MOE_INLINE explicit operator bool() const { return data_ != nullptr; }

  // n of the two columns are there.
  MOE_INLINE float2 load(int64_t row, int64_t col, int n) const {
    const T* from = data_ + row * stride_ + col;
    if (aligned_ && n == 2) {
      const auto pair = arch::load<arch::Pack<T, 2>>(from);
      return {to_float(pair[0]), to_float(pair[1])};
    }
    return {n > 0 ? to_float(from[0]) : 0, n > 1 ? to_float(from[1]) : 0};
  }

  MOE_INLINE void store(int64_t row, int64_t col, float2 value, int n) const {
    T* to = data_ + row * stride_ + col;
    const arch::Pack<T, 2> pair{from_float<T>(value.x), from_float<T>(value.y)};
    if (aligned_ && n == 2) return arch::store_global(to, pair);
    if (n > 0) to[0] = pair[0];
    if (n > 1) to[1] = pair[1];
  }

 private:
  T* data_;
  int64_t stride_;
  bool aligned_;
};

// The gates and ups of two inner columns: two pairs of neighbours, where `first` and `second` say.
struct GateUp {
  float2 gate, up;
};

struct GateUpColumns {
  int64_t first, second;
  int first_count, second_count;
  bool gated, interleaved;

  // Inner columns i and the next, n of which are there; `inner` columns lie between gate and up.
  MOE_INLINE GateUpColumns(const Activation& activation, int64_t i, int64_t inner, int n)
      : gated(activation.gated), interleaved(activation.gated && activation.interleaved) {
    first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 2 : inner + i;
    first_count = interleaved ? 2 * min(n, 1) : n, second_count = !gated ? 0 : interleaved ? 2 * max(n - 1, 0) : n;
  }

  MOE_INLINE GateUp split(float2 a, float2 b) const {
    return interleaved ? GateUp{{a.x, b.x}, {a.y, b.y}} : GateUp{a, b};
  }
  MOE_INLINE float2 first_of(const GateUp& v) const { return interleaved ? float2{v.gate.x, v.up.x} : v.gate; }
  MOE_INLINE float2 second_of(const GateUp& v) const { return interleaved ? float2{v.gate.y, v.up.y} : v.up; }
};

// This thread's warp, and the first of the two columns its lane takes.
struct Lanes {
  int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32, col = 2 * arch::lane_id();
};

template <class T, int rows, int cols>
MOE_INLINE void store_tile(const GroupedGemmParams& p, const Tile& tile, const Products<rows, cols>& products) {
  const PairRows<T> out(p.out);
  const Lanes lanes{};
  for (int row = lanes.warp; row < tile.rows; row += lanes.warps)
    for (int col = lanes.col; col < tile.cols; col += 64)
      out.store(tile.row_begin + row, tile.col_begin + col, products.pair(row, col), min(tile.cols - col, 2));
}

template <class T, int rows, int cols>
MOE_INLINE void activate_tile(const GroupedGemmParams& p, const Tile& tile, const Products<rows, cols>& products) {
  using Math = ActivationMath<MathFor<T>>;
  const int64_t inner = p.activation.gated ? p.n / 2 : p.n;
  const PairRows<T> out(p.out), pre(p.pre, inner);
  const Lanes lanes{};
  for (int row = lanes.warp; row < tile.rows; row += lanes.warps)
    for (int col = lanes.col; col < tile.cols; col += 64) {
      const int n = min(tile.cols - col, 2);
      const GateUpColumns from(p.activation, col, cols / 2, n), to(p.activation, tile.col_begin + col, inner, n);
      const float2 first = products.pair(row, int(from.first));
      const float2 second = from.gated ? products.pair(row, int(from.second)) : float2{0, 0};
      const GateUp h = from.split(first, second);
      if (pre) {
        pre.store(tile.row_begin + row, to.first, first, to.first_count);
        pre.store(tile.row_begin + row, to.second, second, to.second_count);
      }
      out.store(tile.row_begin + row, tile.col_begin + col,
                {Math::forward(p.activation, h.gate.x, h.up.x), Math::forward(p.activation, h.gate.y, h.up.y)}, n);
    }
}

// The products are dA' [rows, inner columns], before the route weight s: dH = s * dA' * act'(H), out = s * A.
// parts [rows of the problem, tiles of columns]: this tile's part of <dA', A>, or null. H and s are read a row ahead.
template <class T, int rows, int cols>
MOE_INLINE void activate_backward_tile(const GroupedGemmParams& p, const Tile& tile,
                                       const Products<rows, cols>& products, float* parts, int col_tiles) {
  using Math = ActivationMath<MathFor<T>>;
  constexpr int pairs = (cols + 63) / 64;  // of columns, for a lane
  const PairRows<T> out(p.out), pre(p.pre, p.n), grad_pre(p.grad_pre, p.n);
  const Lanes lanes{};
  const auto count = [&](int pair) { return max(min(tile.cols - lanes.col - 64 * pair, 2), 0); };
  const auto columns = [&](int pair) -> GateUpColumns {
    return {p.activation, tile.col_begin + lanes.col + 64 * pair, p.n, count(pair)};
  };
  struct Row {
    GateUp h[pairs];
    float score;
  };
  const auto read_row = [&](int row, Row& to) {
    if (row >= tile.rows) return;
    to.score = p.score.data ? read(p.score, slot_of(p.a, tile.row_begin + row)) : 1;
#pragma unroll
    for (int pair = 0; pair < pairs; ++pair) {
      const GateUpColumns at = columns(pair);
      to.h[pair] = at.split(pre.load(tile.row_begin + row, at.first, at.first_count),
                            pre.load(tile.row_begin + row, at.second, at.second_count));
    }
  };

  Row now{}, next{};
  read_row(lanes.warp, now);
  for (int i = lanes.warp; i < tile.rows; i += lanes.warps) {
    read_row(i + lanes.warps, next);
    const int64_t row = tile.row_begin + i;
    const float score = now.score;
    float share = 0;
#pragma unroll
    for (int pair = 0; pair < pairs; ++pair) {
      const int n = count(pair), col = lanes.col + 64 * pair;
      const GateUpColumns at = columns(pair);
      const float2 grad = n > 0 ? products.pair(i, col) : float2{0, 0};
      const auto x = Math::backward(p.activation, now.h[pair].gate.x, now.h[pair].up.x, score * grad.x);
      const auto y = Math::backward(p.activation, now.h[pair].gate.y, now.h[pair].up.y, score * grad.y);
      const GateUp grad_h{{x.gate, y.gate}, {x.up, y.up}};
      out.store(row, tile.col_begin + col, {score * x.value, score * y.value}, n);
      grad_pre.store(row, at.first, at.first_of(grad_h), at.first_count);
      grad_pre.store(row, at.second, at.second_of(grad_h), at.second_count);
      share += (n > 0 ? grad.x * x.value : 0) + (n > 1 ? grad.y * y.value : 0);
    }
    now = next;
    if (parts) {
      share = sum_of_warp(share);
      if (lanes.col == 0) parts[row * col_tiles + tile.col_begin / cols] = share;
    }
  }
}

// Rows of no expert.
template <class T>
MOE_INLINE void zero_tile(const GroupedGemmParams& p, const Tile& tile, const Lanes& lanes = {}) {
  const bool backward = p.epilogue == Epilogue::activate_backward;
  const int64_t inner = backward || !p.activation.gated ? p.n : p.n / 2;
  const Matrix& h = backward ? p.grad_pre : p.pre;
  const PairRows<T> out(p.out), pre(h, inner);
  for (int row = lanes.warp; row < tile.rows; row += lanes.warps)
    for (int col = lanes.col; col < tile.cols; col += 64) {
      const int n = min(tile.cols - col, 2);
      out.store(tile.row_begin + row, tile.col_begin + col, {0, 0}, n);
      if (p.epilogue == Epilogue::store || !pre) continue;
      const GateUpColumns at(p.activation, tile.col_begin + col, inner, n);
      pre.store(tile.row_begin + row, at.first, {0, 0}, at.first_count);
      pre.store(tile.row_begin + row, at.second, {0, 0}, at.second_count);
    }
}

template <class T, int rows, int cols>
MOE_INLINE void finish_tile(const GroupedGemmParams& p, const Tile& tile, const Products<rows, cols>& products,
                            float* parts, int col_tiles) {
  switch (p.epilogue) {
    case Epilogue::store: return store_tile<T>(p, tile, products);
    case Epilogue::activate: return activate_tile<T>(p, tile, products);
    case Epilogue::activate_backward: return activate_backward_tile<T>(p, tile, products, parts, col_tiles);
  }
}

}  // namespace moe
