// Both grouped GEMMs, a tile at a time: pack a block of each operand, multiply, go on along the reduction, then the
// epilogue. An element is summed in order of the reduction, in blocks whose bounds depend on the problem alone: neither
// the other rows of the batch nor the number of threads can change a result.
#pragma once

#include "cpu/isa/epilogue.h"
#include "cpu/isa/few_rows.h"
#include "cpu/isa/prepacked.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

// share[r] += <a[r], bias_e>
template <class X, class C>
void add_bias_share(const GroupedGemmParams& p, int64_t expert, const X* const* rows, int64_t n, C* buffer,
                    int64_t size, C* share, int64_t share_stride) {
  for (int64_t k = 0; k < p.k; k += size) {
    const int64_t depth = p.k - k < size ? p.k - k : size;
    read_bias(p.score_bias, expert, p.k, {k, 1, depth}, buffer);
    for (int64_t i = 0; i < n; ++i) {
      Vec<C> sum{};
      for (int64_t j = 0; j < depth; j += kLanes<C>)
        sum = sum + load<C>(rows[i] + k + j, depth - j) * load<C>(buffer + j, depth - j);
      share[i * share_stride] += sum_lanes<C>(sum);
    }
  }
}

// Many rows: the weights are packed in chunks, columns within a block along K, and each is multiplied at once. Where
// their unit stride runs along K a chunk is a panel, which packing leaves in L1; otherwise it is as wide as the tile,
// so that rows are read in long runs.
template <class Ar, class X, class W>
void multiply_packed(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  const bool along = w.k_stride == 1;
  const int64_t chunk_cols = along ? kPanel<Ar> : w.cols;
  const int64_t per_half = ceil_div(w.cols, chunk_cols), per_block = w.gated ? 2 * per_half : per_half;
  struct Chunk {
    int64_t k, depth, cols, tile_col;
    const W* weights;
  };
  const auto chunk = [&](int64_t i) -> Chunk {
    const int64_t k = i / per_block * kBlockDepth<Ar>, half = i % per_block / per_half;
    const int64_t col = i % per_half * chunk_cols;
    return {k, min(w.depth - k, kBlockDepth<Ar>), min(w.cols - col, chunk_cols), half * kTileCols / 2 + col,
            w.run(half) + col * w.col_stride() + k * w.k_stride};
  };
  const auto ahead = [&](const Chunk& c) -> Ahead {
    const auto* begin = reinterpret_cast<const char*>(c.weights);
    constexpr int64_t size = sizeof(W);
    return along ? Ahead{begin, w.col_stride() * size, c.cols, c.depth * size}
                 : Ahead{begin, w.k_stride * size, c.depth, c.cols * size};
  };

  const int64_t chunks = (w.depth ? ceil_div(w.depth, kBlockDepth<Ar>) : 1) * per_block;
  Chunk next = chunk(0);
  for (int64_t i = 0; i < chunks; ++i) {
    const Chunk c = next;
    next = chunk(min(i + 1, chunks - 1));
    if (i % per_block == 0)
      pack_rows<Ar>(a.rows, a.scale, a.scaled, a.count, c.k, c.depth, blocks.a, RowsOfA<Ar>::kRowStride);
    pack_weights<Ar, X>(c.weights, w.col_stride(), w.k_stride, c.cols, c.depth, blocks.b);
    multiply_block<Ar, RowsOfA<Ar>>(blocks.a, blocks.b, a.count, c.cols, ceil_div(c.depth, Ar::kDepth),
                                    blocks.tile + c.tile_col, c.k == 0, i + 1 < chunks ? ahead(next) : Ahead{});
  }
}

// Few rows, weights with unit stride along K: as much of the rows as fits is packed, then the weights stream by.
template <class Ar, class X, class W>
void multiply_unpacked(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  constexpr int64_t kStride = kFewRowsStride<Ar>, kDepth = kStride * Ar::kDepth;
  // Rows that multiply_few takes besides: what they hold is multiplied, though never stored.
  const int64_t read = round_to_lanes<typename Ar::C>(ceil_div(min(w.depth, kDepth), Ar::kDepth));
  for (int64_t row = a.count; row < rows_taken(a.count); ++row)
    std::memset(blocks.a + row * kStride, 0, read * sizeof(blocks.a[0]));
  for (int64_t k = 0; k < w.depth || k == 0; k += kDepth) {
    const int64_t depth = min(w.depth - k, kDepth);
    pack_rows<Ar>(a.rows, a.scale, a.scaled, a.count, k, depth, blocks.a, kStride);
    for (int64_t half = 0; half <= w.gated; ++half)
      multiply_few<Ar, X>(a.count, blocks.a, w.run(half) + k, w.col_stride(), w.cols, depth,
                          blocks.tile + half * kTileCols / 2, k == 0);
  }
}

template <class Ar, class X, class W>
void multiply_tile(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  if constexpr (std::is_same_v<X, W>)  // prepack has rounded
    if (w.prepacked) return multiply_prepacked<Ar>(a, w, blocks);
  if (a.count <= kFewRows && w.k_stride == 1) multiply_unpacked<Ar>(a, w, blocks);
  else multiply_packed<Ar>(a, w, blocks);
}

template <class X, class W>
void grouped_gemm_tile(const GroupedGemmParams& p, int64_t expert, int64_t row_begin, int64_t row_end,
                       int64_t col_begin, int64_t col_end, void* partial_score, int64_t score_stride) {
  using Ar = Arithmetic<X>;
  using C = typename Ar::C;
  auto& blocks = Blocks<Ar>::of_thread();
  const bool gated = p.epilogue == Epilogue::activate && p.activation.gated;
  const Tile tile{expert, row_begin, row_end - row_begin, col_begin, col_end - col_begin};

  TileRows<X, C> a{.scaled = bool(p.a.scale), .count = tile.rows};
  find_rows(p.a, row_begin, tile.rows, a.rows, a.scale);
  C* const share = p.grad_score ? static_cast<C*>(partial_score) + col_begin / kTileCols : nullptr;
  if (share && p.score_bias && col_begin == 0)
    add_bias_share(p, expert, a.rows, tile.rows, blocks.tile, kTileRows * kTileCols, share + row_begin * score_stride,
                   score_stride);
  if (tile.cols == 0) return;

  const TileWeights<W> w{.data = static_cast<const W*>(p.weight.data) + expert * p.weight.expert_stride,
                         .n_stride = p.weight.n_stride,
                         .k_stride = p.weight.k_stride,
                         .depth = p.k,
                         .at = inner_columns(gated ? p.activation : Activation{.gated = false}, col_begin, p.n / 2),
                         .cols = tile.cols,
                         .gated = gated,
                         .prepacked = p.weight.prepacked};
  multiply_tile<Ar>(a, w, blocks);

  switch (p.epilogue) {
    case Epilogue::store: return store_tile<X>(p, tile, blocks.tile);
    case Epilogue::activate: return activate_tile<X>(p, tile, blocks.tile);
    case Epilogue::activate_backward: return activate_backward_tile<X>(p, tile, blocks.tile, share, score_stride);
  }
}

inline void grouped_gemm(const GroupedGemmParams& p, int64_t expert, int64_t row_begin, int64_t row_end,
                         int64_t col_begin, int64_t col_end, void* partial_score, int64_t score_stride) {
  visit_dtype(p.a.rows.dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    if constexpr (sizeof(X) == 2)  // float32 weights are rounded to the rows' dtype while they are packed
      if (p.weight.dtype == Dtype::float32)
        return grouped_gemm_tile<X, float>(p, expert, row_begin, row_end, col_begin, col_end, partial_score,
                                           score_stride);
    grouped_gemm_tile<X, X>(p, expert, row_begin, row_end, col_begin, col_end, partial_score, score_stride);
  });
}

// to = values [cols], whole lines where they are streamed; or to += values.
template <class S, class C>
MOE_INLINE void store_gradient(S* to, const C* values, int64_t cols, bool accumulate, bool streamed) {
  constexpr int lanes = kLanes<C>;
  if (accumulate) {
    for (int64_t j = 0; j < cols; j += lanes)
      store<C>(to + j, load<C>(to + j, cols - j) + load<C>(values + j), cols - j);
  } else if (streamed) {
    for (int64_t j = 0; j < cols; j += lanes) stream_vector(to + j, from_compute<S, C>(load<C>(values + j)));
  } else {
    for (int64_t j = 0; j < cols; j += lanes) store<C>(to + j, load<C>(values + j), cols - j);
  }
}

template <class X>
void weight_grad_tile(const WeightGradParams& p, int64_t expert, int64_t row_begin, int64_t row_end, int64_t n_begin,
                      int64_t k_begin) {
  using Ar = Arithmetic<X>;
  using C = typename Ar::C;
  auto& blocks = Blocks<Ar>::of_thread();
  const int64_t n = min(p.n - n_begin, kTileRows), cols = min(p.k - k_begin, kTileCols);
  const X* rows[kBlockDepth<Ar>];
  C scale[kBlockDepth<Ar>];

  for (int64_t row = row_begin; row < row_end || row == row_begin; row += kBlockDepth<Ar>) {
    const int64_t depth = row_end - row < kBlockDepth<Ar> ? row_end - row : kBlockDepth<Ar>;
    const int64_t steps = ceil_div(depth, Ar::kDepth);
    find_rows(p.grad, row, depth, rows, scale);
    pack_columns<Ar, kTileRows>(rows, scale, bool(p.grad.scale), depth, n_begin, n, blocks.a);
    find_rows(p.a, row, depth, rows, scale);
    pack_columns<Ar, kPanel<Ar>>(rows, scale, bool(p.a.scale), depth, k_begin, cols, blocks.b);
    multiply_block<Ar, ColumnsOfA<Ar>>(blocks.a, blocks.b, n, cols, steps, blocks.tile, row == row_begin);
  }

  visit_dtype(p.out_dtype, [&](auto* out) {
    using S = std::remove_pointer_t<decltype(out)>;
    const bool streamed = !p.accumulate && is_streamed(p.out, p.num_experts * p.n, p.k * int64_t(sizeof(S)));
    for (int64_t i = 0; i < n; ++i)
      store_gradient(static_cast<S*>(p.out) + (expert * p.n + n_begin + i) * p.k + k_begin, blocks.tile + i * kTileCols,
                     cols, p.accumulate, streamed);
    if (streamed) end_of_stream();
  });
}

inline void grouped_gemm_weight_grad(const WeightGradParams& p, int64_t expert, int64_t row_begin, int64_t row_end,
                                     int64_t n_begin, int64_t k_begin) {
  visit_dtype(p.a.rows.dtype, [&](auto* x) {
    weight_grad_tile<std::remove_pointer_t<decltype(x)>>(p, expert, row_begin, row_end, n_begin, k_begin);
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
