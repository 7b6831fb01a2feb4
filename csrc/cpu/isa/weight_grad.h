// The ragged-K product: the gradients of weights, a strip of tiles at a time, and of biases. An element is summed in
// the order of its expert's rows, in blocks.
#pragma once

#include "cpu/isa/beside.h"

namespace moe::MOE_ISA {

// Takes the sums of a block: they join those of the blocks before in the tile, and the last ones are the gradient.
template <class S, class C>
struct Gradient {
  static constexpr int kCols = kMicroVectors * kLanes<C>, kVectors = kMicroRows * kMicroVectors;
  static_assert(kMicroVectors == 2);  // a row's results are joined in pairs

  TileSums<C> tile;
  bool last, accumulate, streamed;
  int64_t cols;  // that are left
  S* out;
  int64_t stride;

  Gradient at(int64_t row, int64_t col) const {
    return {tile.at(row, col), last, accumulate, streamed, cols - col, out + row * stride + col, stride};
  }
  // Of vector i of kVectors.
  C* tile_at(int i) const { return tile.c + i / kMicroVectors * kTileCols + i % kMicroVectors * kLanes<C>; }
  S* out_at(int i) const { return out + i / kMicroVectors * stride + i % kMicroVectors * kLanes<C>; }

  template <int rows>
  MOE_INLINE void take(const Vec<C> (&sums)[rows][kMicroVectors]) const {
    if constexpr (rows == kMicroRows)
      if (last && cols >= kCols) return store_whole(sums);
    tile.take(sums);
    if (last) store_from_tile(rows, accumulate);
  }

  // Straight from the registers of the micro-kernel. What rounding flushes is looked for only where a result is zero:
  // results are fewer vectors than sums.
  MOE_INLINE void store_whole(const Vec<C> (&sums)[kMicroRows][kMicroVectors]) const {
    Vec<C> values[kVectors];
#pragma GCC unroll 24
    for (int i = 0; i < kVectors; ++i) {
      values[i] = joined<C>(tile_at(i), sums[i / kMicroVectors][i % kMicroVectors], tile.first);
      if (accumulate) values[i] = load<C>(out_at(i)) + values[i];
    }
    auto least = ~Vec<uint16_t>{};  // of the results' bits but the sign
#pragma GCC unroll 24
    for (int i = 0; i < kVectors; i += kMicroVectors) {
      const auto a = from_compute<S, C, true>(values[i]), b = from_compute<S, C, true>(values[i + 1]);
      if constexpr (2 * sizeof(a) == MOE_VECTOR_BYTES) {
        const auto row = join(a, b, std::make_integer_sequence<int, kCols>());
        store_result(i, row);
        if constexpr (kRoundingFlushes<S, C>) least = smaller<uint16_t>(least, row + row);
      } else {
        store_result(i, a);
        store_result(i + 1, b);
      }
    }
    if constexpr (kRoundingFlushes<S, C>)
      if (__builtin_expect(any_zero(least), 0)) {
        bool flushed = false;
#pragma GCC unroll 24
        for (int i = 0; i < kVectors; ++i) flushed |= any_denormal(values[i]);
        if (!flushed) return;
#pragma GCC unroll 24
        for (int i = 0; i < kVectors; ++i) store_vector(tile_at(i), values[i]);
        store_from_tile(kMicroRows, false);
      }
  }
  template <class V>
  MOE_INLINE void store_result(int i, V v) const {
    if (streamed) stream_vector(out_at(i), v);
    else std::memcpy(out_at(i), &v, sizeof(v));
  }
  // Fewer rows or columns than a whole call has, and what rounding would flush. Not inlined: rare, and called from
  // every number of rows.
  __attribute__((noinline)) void store_from_tile(int rows, bool add) const {
    for (int row = 0; row < rows; ++row)
      for (int64_t col = 0; col < min(cols, kCols); col += kLanes<C>) {
        S* const to = out + row * stride + col;
        const auto sum = load<C>(tile.c + row * kTileCols + col);
        store<C>(to, add ? load<C>(to, cols - col) + sum : sum, cols - col);
      }
  }
};

// The rows of an operand within a block of the reduction.
template <class Ar, class X>
struct BlockOfRows {
  const GatheredRows& operand;
  const X* rows[kBlockDepth<Ar>];
  typename Ar::C scale[kBlockDepth<Ar>];

  void find(int64_t row, int64_t depth) { find_rows(operand, row, depth, rows, scale); }
  FoundRows<X, typename Ar::C> from(int64_t col) const { return {rows, scale, bool(operand.scale), col}; }
};

// Of each tile, of each block of the expert's rows: two panels of a's columns.
template <class Ar>
struct GradientChunks {
  struct Chunk {
    int64_t tile, row, col, depth, cols;
    int64_t steps() const { return ceil_div(depth, Ar::kDepth); }
  };
  int64_t row_begin, row_end, k_end;

  int64_t tile_end(int64_t tile) const { return min(tile + kTileCols, k_end); }
  // Behind the last tile they are empty.
  Chunk at(int64_t tile, int64_t row, int64_t col) const {
    if (tile >= k_end) return {tile, row, col, 0, 0};
    return {tile, row, col, min(row_end - row, kBlockDepth<Ar>), min(tile_end(tile) - col, 2 * kPanel<Ar>)};
  }
  Chunk after(const Chunk& c) const {
    if (c.col + c.cols < tile_end(c.tile)) return at(c.tile, c.row, c.col + c.cols);
    if (c.row + c.depth < row_end) return at(c.tile, c.row + c.depth, c.tile);
    return at(c.tile + kTileCols, row_begin, c.tile + kTileCols);
  }
};

// The gradient of an expert without rows.
template <class S>
void store_zeros(S* to, int64_t rows, int64_t cols, int64_t stride, bool streamed) {
  constexpr int lanes = MOE_VECTOR_BYTES / sizeof(S);
  for (int64_t row = 0; row < rows; ++row, to += stride)
    if (!streamed) std::memset(to, 0, cols * sizeof(S));
    else
      for (int64_t col = 0; col < cols; col += lanes) stream_vector(to + col, Vec<uint8_t>{});
}

// The tiles of a strip of rows n_begin.. beside each other. The block of grad is packed once where it holds all rows of
// the expert. While a chunk of a's columns is multiplied the next one is packed.
template <class S, class X>
void weight_grad_strip(const WeightGradParams& p, int64_t expert, int64_t row_begin, int64_t row_end, int64_t n_begin,
                       int64_t k_begin, int64_t k_end) {
  using Ar = Arithmetic<X>;
  using C = typename Ar::C;
  auto& blocks = Blocks<Ar>::of_thread();
  const int64_t n = min(p.n - n_begin, kTileRows);
  // Whole vectors are streamed: those of a result that is wider than C could end in the next row.
  const bool streamed =
      sizeof(S) <= sizeof(C) && !p.accumulate && is_streamed(p.out, p.num_experts * p.n, p.k * int64_t(sizeof(S)));
  S* const out = static_cast<S*>(p.out) + (expert * p.n + n_begin) * p.k;
  if (row_begin == row_end) {
    if (!p.accumulate) store_zeros(out + k_begin, n, k_end - k_begin, p.k, streamed);
    if (streamed) end_of_stream();
    return;
  }
  const bool is_one_block = row_end - row_begin <= kBlockDepth<Ar>;
  BlockOfRows<Ar, X> grad{p.grad}, a{p.a};
  const GradientChunks<Ar> chunks{row_begin, row_end, k_end};

  auto c = chunks.at(k_begin, row_begin, k_begin);
  a.find(c.row, c.depth);
  pack_steps<Ar, X, kPanel<Ar>>(a.from(c.col), c.depth, c.cols, blocks.b[0]);
  for (int64_t i = 0; c.tile < k_end; ++i) {
    if (i == 0 || (c.col == c.tile && !is_one_block)) {
      grad.find(c.row, c.depth);
      pack_steps<Ar, X, kTileRows>(grad.from(n_begin), c.depth, n, blocks.a[0]);
    }
    const auto next = chunks.after(c);
    if (next.row != c.row) a.find(next.row, next.depth);
    auto *const b = blocks.b[i % 2], *const next_b = blocks.b[(i + 1) % 2];
    AcrossBeside<Ar, X, FoundRows<X, C>> packing(a.from(next.col), a.from(next.col + next.cols), next.cols, next.depth,
                                                 next_b, turns_of_block<Ar>(n, c.cols, c.steps()));
    const Gradient<S, C> gradient{.tile = {blocks.tile + (c.col - c.tile), c.row == row_begin},
                                  .last = c.row + c.depth >= row_end,
                                  .accumulate = p.accumulate,
                                  .streamed = streamed,
                                  .cols = c.cols,
                                  .out = out + c.col,
                                  .stride = p.k};
    // Both panels side by side while L1 holds them, so that longer runs of a result's row are stored.
    const int64_t width = 2 * c.steps() <= kBlockSteps ? c.cols : kMicroCols<Ar>;
    multiply_block<Ar, ColumnsOfA<Ar>>(blocks.a[0], b, n, c.cols, c.steps(), width, gradient, {}, packing);
    finish_pieces(packing);
    pack_steps<Ar, X, kPanel<Ar>>(a.from(next.col), next.depth, next.cols, next_b, packing.whole);
    c = next;
  }
  if (streamed) end_of_stream();
}

inline void grouped_gemm_weight_grad(const WeightGradParams& p, int64_t expert, int64_t row_begin, int64_t row_end,
                                     int64_t n_begin, int64_t k_begin, int64_t k_end) {
  visit_dtype(p.a.rows.dtype, [&](auto* x) {
    visit_dtype(p.out_dtype, [&](auto* out) {
      weight_grad_strip<std::remove_pointer_t<decltype(out)>, std::remove_pointer_t<decltype(x)>>(
          p, expert, row_begin, row_end, n_begin, k_begin, k_end);
    });
  });
}

inline void grouped_gemm_bias_grad(const BiasGradParams& p, int64_t expert, int64_t row_begin, int64_t row_end,
                                   int64_t col_begin, int64_t col_end) {
  constexpr int64_t kBlockRows = 16;  // summed apart, then in double: errors do not grow with the number of rows
  visit_dtype(p.grad.rows.dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    using C = Compute<X>;
    for (int64_t col = col_begin; col < col_end; col += kLanes<C>) {
      double sum[kLanes<C>] = {};
      C lanes[kLanes<C>];
      for (int64_t block = row_begin; block < row_end; block += kBlockRows) {
        const int64_t block_end = block + kBlockRows < row_end ? block + kBlockRows : row_end;
        Vec<C> part{};
        for (int64_t row = block; row < block_end; ++row) {
          const X* from;
          C scale;
          find_rows(p.grad, row, 1, &from, &scale);
          part = part + load<C>(from + col, col_end - col) * broadcast(scale);
        }
        store<C>(lanes, part);
        for (int lane = 0; lane < kLanes<C>; ++lane) sum[lane] += lanes[lane];
      }
      for (int lane = 0; lane < kLanes<C>; ++lane) lanes[lane] = C(sum[lane]);
      visit_dtype(p.out_dtype, [&](auto* out) {
        using S = std::remove_pointer_t<decltype(out)>;
        store<C>(static_cast<S*>(p.out) + expert * p.n + col, load<C>(lanes), col_end - col);
      });
    }
  });
}

}  // namespace moe::MOE_ISA
