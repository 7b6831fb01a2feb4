// The ragged-K product: the gradients of weights, a strip of tiles at a time, and of biases. An element is summed in
// the order of its expert's rows, in blocks.
#pragma once

#include "cpu/isa/beside.h"

namespace moe::MOE_ISA {

// Results that are stored while the next ones are computed: a piece is a line, or a vector where that is more.
template <class S, class C>
struct GradientBeside {
  static constexpr int kCols = kLanes<C> * int(sizeof(S)) < kLine ? kLine / int(sizeof(S)) : kLanes<C>;

  const C* values;
  int64_t rows, cols;
  S* out;
  int64_t stride;
  bool accumulate, streamed;
  Pieces pieces;
  int64_t row = 0, col = 0;

  MOE_INLINE void store_vector_at(S* to, const C* from, int64_t n) const {
    const auto value = load<C>(from);
    if (accumulate) store<C>(to, load<C>(to, n) + value, n);
    else if (streamed) stream_vector(to, from_compute<S, C>(value));
    else store<C>(to, value, n);
  }
  MOE_INLINE void piece() {
    for (int at = 0; at < kCols && col + at < cols; at += kLanes<C>)
      store_vector_at(out + row * stride + col + at, values + row * kTileCols + col + at, cols - col - at);
    col += kCols;
    if (col >= cols) col = 0, ++row;
  }
  void finish() {
    for (; row < rows; ++row, col = 0)
      for (; col < cols; col += kLanes<C>)
        store_vector_at(out + row * stride + col, values + row * kTileCols + col, cols - col);
    pieces.left = 0;
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

// Of each tile, of each block of the expert's rows: two panels of a's columns; or all of the tile's, in one buffer,
// where so few rows are multiplied that a turn would have more than kMostPieces lines to store.
template <class Ar>
struct GradientChunks {
  struct Chunk {
    int64_t tile, row, col, depth, cols;
    int64_t steps() const { return ceil_div(depth, Ar::kDepth); }
  };
  int64_t row_begin, row_end, k_end;
  bool wide = (row_end - row_begin) * kMostPieces * kLine <
              kMicroRows * kMicroCols<Ar> * kTurnSteps * int64_t(sizeof(typename Ar::C));

  int64_t tile_end(int64_t tile) const { return min(tile + kTileCols, k_end); }
  // Behind the last tile they are empty.
  Chunk at(int64_t tile, int64_t row, int64_t col) const {
    if (tile >= k_end) return {tile, row, col, 0, 0};
    return {tile, row, col, min(row_end - row, kBlockDepth<Ar>),
            min(tile_end(tile) - col, wide ? kTileCols : 2 * kPanel<Ar>)};
  }
  Chunk after(const Chunk& c) const {
    if (c.col + c.cols < tile_end(c.tile)) return at(c.tile, c.row, c.col + c.cols);
    if (c.row + c.depth < row_end) return at(c.tile, c.row + c.depth, c.tile);
    return at(c.tile + kTileCols, row_begin, c.tile + kTileCols);
  }
};

// The tiles of a strip of rows n_begin.. beside each other. The block of grad is packed once where it holds all rows of
// the expert. While a chunk of a's columns is multiplied the next one is packed and the results of the one before are
// stored.
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
  const bool is_one_block = row_end - row_begin <= kBlockDepth<Ar>;
  BlockOfRows<Ar, X> grad{p.grad}, a{p.a};
  const GradientChunks<Ar> chunks{row_begin, row_end, k_end};

  auto c = chunks.at(k_begin, row_begin, k_begin);
  a.find(c.row, c.depth);
  pack_steps<Ar, X, kPanel<Ar>>(a.from(c.col), c.depth, c.cols, blocks.b[0]);
  GradientBeside<S, C> gradient{};
  for (int64_t i = 0; c.tile < k_end; ++i) {
    if (i == 0 || (c.col == c.tile && !is_one_block)) {
      grad.find(c.row, c.depth);
      pack_steps<Ar, X, kTileRows>(grad.from(n_begin), c.depth, n, blocks.a[0]);
    }
    const auto next = chunks.after(c);
    if (next.row != c.row) a.find(next.row, next.depth);
    auto *const b = blocks.b[chunks.wide ? 0 : i % 2], *const next_b = blocks.b[chunks.wide ? 0 : (i + 1) % 2];
    const int64_t turns = chunks.wide ? 0 : turns_of_block<Ar>(n, c.cols, c.steps());
    AcrossBeside<Ar, X, FoundRows<X, C>> packing(a.from(next.col), a.from(next.col + next.cols), next.cols, next.depth,
                                                 next_b, turns);
    gradient.pieces.each = Pieces::spread(gradient.pieces.left, turns).each;
    C* const values = blocks.tile + (c.col - c.tile);
    multiply_block<Ar, ColumnsOfA<Ar>>(blocks.a[0], b, n, c.cols, c.steps(), values, c.row == row_begin, {}, packing,
                                       gradient);
    finish_pieces(packing);
    gradient.finish();
    pack_steps<Ar, X, kPanel<Ar>>(a.from(next.col), next.depth, next.cols, next_b, packing.whole);
    if (c.row + c.depth >= row_end)
      gradient = {.values = values,
                  .rows = n,
                  .cols = c.cols,
                  .out = static_cast<S*>(p.out) + (expert * p.n + n_begin) * p.k + c.col,
                  .stride = p.k,
                  .accumulate = p.accumulate,
                  .streamed = streamed,
                  .pieces = {n * ceil_div(c.cols, gradient.kCols)}};
    if (chunks.wide) gradient.finish();  // the next tile stands in its place
    c = next;
  }
  gradient.finish();
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
