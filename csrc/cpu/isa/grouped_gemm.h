// Both grouped GEMMs, a tile at a time: pack a block of each operand, multiply, go on along the reduction, then the
// epilogue. An element is summed in order of the reduction, in blocks whose bounds depend on the problem alone: neither
// the other rows of the batch nor the number of threads can change a result.
#pragma once

#include "cpu/isa/beside.h"
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

// Many rows: the weights are packed in chunks, columns within a block along K: a panel where their unit stride runs
// along K, otherwise kAcrossCols, so that rows are read in longer runs. While a chunk is multiplied the next one is
// packed, with a share of the rows' next block, and the one behind it is asked for.
template <bool along, class Ar, class X, class W>
void multiply_packed(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  constexpr int64_t kCols = along ? kPanel<Ar> : kAcrossCols<Ar>;
  const int64_t per_half = ceil_div(w.cols, kCols), per_block = w.gated ? 2 * per_half : per_half;
  struct Chunk {
    int64_t k, depth, cols, tile_col;
    const W* weights;
    int64_t steps() const { return ceil_div(depth, Ar::kDepth); }
  };
  const auto chunk = [&](int64_t i) -> Chunk {
    const int64_t k = i / per_block * kBlockDepth<Ar>, half = i % per_block / per_half;
    const int64_t col = i % per_half * kCols;
    return {k, min(w.depth - k, kBlockDepth<Ar>), min(w.cols - col, kCols), half * kTileCols / 2 + col,
            w.run(half) + col * w.col_stride() + k * w.k_stride};
  };
  const auto ahead = [&](const Chunk& c) -> Ahead {
    const auto* begin = reinterpret_cast<const char*>(c.weights);
    constexpr int64_t size = sizeof(W);
    return along ? Ahead{begin, w.col_stride() * size, c.cols, c.depth * size}
                 : Ahead{begin, w.k_stride * size, c.depth, c.cols * size};
  };
  const auto weights_beside = [&](const Chunk& c, const Chunk& behind, Element* to, int64_t turns) {
    const bool is_whole = c.cols % kPanel<Ar> == 0;
    if constexpr (along) {
      using Work = PanelBeside<Ar, X, W>;
      const int64_t whole = is_whole ? c.steps() / Work::kSteps * Work::kSteps : 0;
      return Work{c.weights,
                  behind.weights,
                  w.col_stride(),
                  whole,
                  to,
                  Beside::spread(c.cols / Work::kRows * (whole / Work::kSteps), turns)};
    } else {
      const int64_t whole = is_whole && w.col_stride() == 1 ? c.depth / Ar::kDepth : 0;
      return AcrossBeside<Ar, X, W, StridedRows<W, C>>{{c.weights, w.k_stride},
                                                       {behind.weights, w.k_stride},
                                                       c.cols,
                                                       c.steps(),
                                                       whole,
                                                       to,
                                                       Beside::spread(c.cols / kLanes<C> * whole, turns)};
    }
  };
  const auto pack_weights_from = [&](const Chunk& c, Element* to, int64_t step) {
    if (step < c.steps()) pack_weights<Ar, X>(c.weights, w.col_stride(), w.k_stride, c.cols, c.depth, to, step);
  };
  const int64_t chunks = (w.depth ? ceil_div(w.depth, kBlockDepth<Ar>) : 1) * per_block;
  Chunk c = chunk(0);
  ahead(c).ask();
  pack_row_blocks<Ar>(a, 0, c.depth, blocks.a[0], 0);
  pack_weights_from(c, blocks.b[0], 0);
  RowsBeside<Ar, X> rows{};
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t block = i / per_block;
    const int64_t end = c.k + c.depth, next_end = min(end + kBlockDepth<Ar>, w.depth);  // of the rows' blocks
    const int64_t turns = turns_of_block<Ar>(a.count, c.cols, c.steps());
    const Chunk next = i + 1 < chunks ? chunk(i + 1) : Chunk{};
    Element *const next_b = blocks.b[(i + 1) % 2], *const next_a = blocks.a[(block + 1) % 2];
    auto weights = weights_beside(next, chunk(min(i + 2, chunks - 1)), next_b, turns);
    if (i % per_block == 0) rows = RowsBeside<Ar, X>(a, end, next_end, next_a, 0, turns * per_block);
    auto beside = [&]() __attribute__((always_inline)) {
      take_turn(weights);
      take_turn(rows);
    };
    multiply_block<Ar, RowsOfA<Ar>>(blocks.a[block % 2], blocks.b[i % 2], a.count, c.cols, c.steps(),
                                    blocks.tile + c.tile_col, c.k == 0, {}, beside);
    finish(weights);
    pack_weights_from(next, next_b, weights.whole);
    if (i % per_block == per_block - 1) {
      finish(rows);
      pack_row_blocks<Ar>(a, end, next_end, next_a, 0, rows.whole);
    }
    c = next;
  }
}

// Few rows: as much of them as fits is packed, then the weights stream by.
template <bool along, class Ar, class X, class W>
void multiply_unpacked(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  constexpr int64_t kStride = kFewRowsStride<Ar>, kDepth = kStride * Ar::kDepth;
  // Rows that are taken besides: what they hold is multiplied, though never stored.
  const int64_t read = round_to_lanes<typename Ar::C>(ceil_div(min(w.depth, kDepth), Ar::kDepth));
  for (int64_t row = a.count; row < rows_taken(a.count); ++row)
    std::memset(blocks.a[0] + row * kStride, 0, read * sizeof(blocks.a[0][0]));
  for (int64_t k = 0; k < w.depth || k == 0; k += kDepth) {
    const int64_t depth = min(w.depth - k, kDepth);
    pack_rows<Ar>(a.rows, a.scale, a.scaled, a.count, k, depth, blocks.a[0], kStride);
    for (int64_t half = 0; half <= w.gated; ++half) {
      const W* weights = w.run(half) + k * w.k_stride;
      auto* const to = blocks.tile + half * kTileCols / 2;
      if (along) multiply_few<Ar, X>(a.count, blocks.a[0], weights, w.col_stride(), w.cols, depth, to, k == 0);
      else multiply_few_across<Ar, X>(a.count, blocks.a[0], weights, w.k_stride, w.cols, depth, to, k == 0);
    }
  }
  for (int64_t half = 0; along && half <= w.gated; ++half)
    columns_in_order(a.count, w.cols, blocks.tile + half * kTileCols / 2);
}

template <class Ar, class X, class W>
void multiply_tile(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  if constexpr (std::is_same_v<X, W>)  // prepack has rounded
    if (w.prepacked) return multiply_prepacked<Ar>(a, w, blocks);
  const bool few = a.count <= kFewRows;
  if (w.k_stride == 1) few ? multiply_unpacked<true, Ar>(a, w, blocks) : multiply_packed<true, Ar>(a, w, blocks);
  else if (few && w.col_stride() == 1) multiply_unpacked<false, Ar>(a, w, blocks);
  else multiply_packed<false, Ar>(a, w, blocks);
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

// Results that are stored while the next ones are computed: a piece is a vector.
template <class S, class C>
struct GradientBeside {
  const C* values;
  int64_t cols;
  S* out;
  int64_t stride;
  bool accumulate, streamed;
  Beside pieces;
  int64_t row = 0, col = 0;

  MOE_INLINE void piece() {
    store_gradient(out + row * stride + col, values + row * kTileCols + col, min(cols - col, kLanes<C>), accumulate,
                   streamed);
    col += kLanes<C>;
    if (col >= cols) col = 0, ++row;
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
  const bool streamed = !p.accumulate && is_streamed(p.out, p.num_experts * p.n, p.k * int64_t(sizeof(S)));
  const bool is_one_block = row_end - row_begin <= kBlockDepth<Ar>;
  const X* rows[kBlockDepth<Ar>];
  C scale[kBlockDepth<Ar>];

  struct Chunk {
    int64_t tile, row, depth, col, cols;
    int64_t steps() const { return ceil_div(depth, Ar::kDepth); }
  };
  const auto chunk = [&](int64_t tile, int64_t row, int64_t col) -> Chunk {
    return {tile, row, min(row_end - row, kBlockDepth<Ar>), col,
            min(min(tile + kTileCols, k_end) - col, kAcrossCols<Ar>)};
  };
  const auto after = [&](const Chunk& c) {
    if (c.col + c.cols < min(c.tile + kTileCols, k_end)) return chunk(c.tile, c.row, c.col + c.cols);
    if (c.row + c.depth < row_end) return chunk(c.tile, c.row + c.depth, c.tile);
    return chunk(c.tile + kTileCols, row_begin, c.tile + kTileCols);
  };
  const auto columns = [&](const Chunk& c) { return FoundRows<X, C>{rows, scale, bool(p.a.scale), c.col}; };

  GradientBeside<S, C> gradient{};
  Chunk c = chunk(k_begin, row_begin, k_begin);
  for (int64_t i = 0; c.tile < k_end; ++i) {
    if (i == 0 || (c.col == c.tile && !is_one_block)) {
      find_rows(p.grad, c.row, c.depth, rows, scale);
      pack_steps<Ar, X, kTileRows>(FoundRows<X, C>{rows, scale, bool(p.grad.scale), n_begin}, c.depth, n, blocks.a[0]);
      find_rows(p.a, c.row, c.depth, rows, scale);
    }
    if (i == 0) pack_steps<Ar, X, kPanel<Ar>>(columns(c), c.depth, c.cols, blocks.b[0]);
    Chunk next = after(c);
    if (next.tile >= k_end) next.depth = next.cols = 0;
    else if (next.row != c.row) find_rows(p.a, next.row, next.depth, rows, scale);

    const int64_t turns = turns_of_block<Ar>(n, c.cols, c.steps());
    const int64_t whole = next.cols % kPanel<Ar> == 0 ? next.depth / Ar::kDepth : 0;
    AcrossBeside<Ar, X, X, FoundRows<X, C>> packing{columns(next),
                                                    columns(next),
                                                    next.cols,
                                                    next.steps(),
                                                    whole,
                                                    blocks.b[(i + 1) % 2],
                                                    Beside::spread(next.cols / kLanes<C> * whole, turns)};
    gradient.pieces = Beside::spread(gradient.pieces.left, turns);
    packing.behind.col_begin += next.cols;
    auto beside = [&]() __attribute__((always_inline)) {
      take_turn(packing);
      take_turn(gradient);
    };
    C* const values = blocks.tile + (c.col - c.tile);
    multiply_block<Ar, ColumnsOfA<Ar>>(blocks.a[0], blocks.b[i % 2], n, c.cols, c.steps(), values, c.row == row_begin,
                                       {}, beside);
    finish(packing);
    finish(gradient);
    if (whole < next.steps())
      pack_steps<Ar, X, kPanel<Ar>>(columns(next), next.depth, next.cols, blocks.b[(i + 1) % 2], whole);
    if (c.row + c.depth >= row_end) {
      S* const out = static_cast<S*>(p.out) + (expert * p.n + n_begin) * p.k + c.col;
      gradient = {values, c.cols, out, p.k, p.accumulate, streamed, {n * ceil_div(c.cols, kLanes<C>)}};
    }
    c = next;
  }
  finish(gradient);
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
