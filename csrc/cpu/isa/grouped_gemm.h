// The ragged-M product, a tile at a time: along the reduction in blocks, the next ones packed while these are
// multiplied; then the epilogue. An element is summed in order of the reduction, in blocks whose bounds depend on the
// problem alone, so that neither the other rows of the batch nor the number of threads can change a result; dot_rows.h
// alone sums otherwise, where batch invariance is not asked for.
#pragma once

#include "cpu/isa/beside.h"
#include "cpu/isa/dot_rows.h"
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

// The ways of multiplying many rows, by how weights are packed: along the reduction, a few weight rows at a time or a
// few steps of all of them, or across it.
enum class ManyRows { along, along_by_steps, across };

// The weights of a tile in chunks, columns within a block along K: a panel where their unit stride runs along K,
// otherwise two, so that rows are read in longer runs. Where too few rows are multiplied for packing to hide in it,
// such a chunk is as wide as the tile, in one buffer.
template <ManyRows way, class Ar, class X, class W>
struct WeightChunks {
  static constexpr bool along = way != ManyRows::across;
  using Packing = std::conditional_t<along, PanelBeside<Ar, X, W, way == ManyRows::along_by_steps>,
                                     AcrossBeside<Ar, X, StridedRows<W>>>;
  struct Chunk {
    const W* weights = nullptr;
    int64_t k = 0, depth = 0, cols = 0, tile_col = 0;
    int64_t steps() const { return ceil_div(depth, Ar::kDepth); }
  };

  const TileWeights<W>& w;
  int64_t rows;  // that are multiplied
  bool wide = !along && turns_of_block<Ar>(rows, kPanel<Ar>, kBlockSteps) * Packing::kMost < Packing::kPanelPieces;
  int64_t cols = along ? kPanel<Ar> : wide ? kTileCols : 2 * kPanel<Ar>;
  int64_t per_half = ceil_div(w.cols, cols), per_block = w.two_runs ? 2 * per_half : per_half;
  int64_t count = (w.depth ? ceil_div(w.depth, kBlockDepth<Ar>) : 1) * per_block;

  // Behind the last one comes an empty one.
  Chunk at(int64_t i) const {
    if (i >= count) return {};
    const int64_t k = i / per_block * kBlockDepth<Ar>, half = i % per_block / per_half, col = i % per_half * cols;
    return {w.run(half) + col * w.n_stride + k * w.k_stride, k, min(w.depth - k, kBlockDepth<Ar>),
            min(w.cols - col, cols), half * kTileCols / 2 + col};
  }
  Ahead ahead(const Chunk& c) const {
    return along ? Ahead::of(c.weights, w.n_stride, c.cols, c.depth)
                 : Ahead::of(c.weights, w.k_stride, c.depth, c.cols);
  }
  MOE_INLINE void ask_for(const Chunk& c) const {
    for (int64_t i = 0; i < (along ? c.cols : c.depth); ++i)
      fetch_ahead<2>(c.weights + i * (along ? w.n_stride : w.k_stride), along ? c.depth : c.cols);
  }
  void pack(const Chunk& c, typename Ar::Element* to, int64_t first_step) const {
    pack_weights<Ar, X>(c.weights, w.n_stride, w.k_stride, c.cols, c.depth, to, first_step);
  }
  Packing beside(const Chunk& c, const Chunk& behind, typename Ar::Element* to, int64_t turns) const {
    if constexpr (along) return {c.weights, behind.weights, w.n_stride, c.cols, c.depth, to, turns};
    else return {{c.weights, w.k_stride}, {behind.weights, w.k_stride}, c.cols, c.depth, to, turns};
  }
};

// Many rows: while a chunk is multiplied the next one is packed, with a share of the rows' next block, and the one
// behind it is asked for.
template <ManyRows way, class Ar, class X, class W>
void multiply_packed(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  const WeightChunks<way, Ar, X, W> chunks{w, a.count};
  auto c = chunks.at(0);
  chunks.ask_for(c);  // comes while the rows are packed
  if (chunks.along) chunks.ask_for(chunks.at(1));
  pack_row_blocks<Ar>(a, 0, c.depth, blocks.a[0], 0);
  chunks.pack(c, blocks.b[0], 0);
  RowsBeside<Ar, X> rows;
  for (int64_t i = 0; i < chunks.count; ++i) {
    const int64_t block = i / chunks.per_block, in_block = i % chunks.per_block, end = c.k + c.depth;
    const int64_t turns = turns_of_block<Ar>(a.count, c.cols, c.steps());
    const auto next = chunks.at(i + 1);
    auto *const b = blocks.b[chunks.wide ? 0 : i % 2], *const next_b = blocks.b[chunks.wide ? 0 : (i + 1) % 2];
    auto weights = chunks.beside(next, chunks.at(min(i + 2, chunks.count - 1)), next_b, chunks.wide ? 0 : turns);
    if (in_block == 0)
      rows = {a, end, min(end + kBlockDepth<Ar>, w.depth), blocks.a[(block + 1) % 2], 0, turns * chunks.per_block};
    const TileSums<typename Ar::C> sums{blocks.tile + c.tile_col, c.k == 0};
    multiply_block<Ar, RowsOfA<Ar>>(blocks.a[block % 2], b, a.count, c.cols, c.steps(), kMicroCols<Ar>, sums,
                                    weights.whole ? Ahead{} : chunks.ahead(next), weights, rows);
    finish_pieces(weights);
    chunks.pack(next, next_b, weights.whole);
    if (in_block == chunks.per_block - 1) rows.finish();
    c = next;
  }
}

// The ways of multiplying few rows by weights as they lie: along the reduction as dot products or by squares that are
// transposed, or across it.
enum class FewRows { dots, squares, across };

// Few rows: as much of them as fits is packed, then the weights stream by.
template <FewRows way, class Ar, class X, class W>
void multiply_unpacked(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, Blocks<Ar>& blocks) {
  constexpr int64_t kStride = way == FewRows::dots ? kDotStride<Ar> : kFewRowsStride<Ar>, kDepth = kStride * Ar::kDepth;
  if (way != FewRows::dots) clear_rows_besides<Ar>(a.count, min(w.depth, kDepth), blocks.a[0]);
  for (int64_t k = 0; k < w.depth || k == 0; k += kDepth) {
    const int64_t depth = min(w.depth - k, kDepth);
    pack_rows<Ar>(a.rows, a.scale, a.scaled, a.count, k, depth, blocks.a[0], kStride);
    for (int64_t half = 0; half <= w.two_runs; ++half) {
      const W* weights = w.run(half) + k * w.k_stride;
      auto* const to = blocks.tile + half * kTileCols / 2;
      if constexpr (way == FewRows::dots)
        multiply_few_dots<Ar, X>(a.count, blocks.a[0], weights, w.n_stride, w.cols, depth, to, k == 0);
      else if constexpr (way == FewRows::squares)
        multiply_few_squares<Ar, X>(a.count, blocks.a[0], weights, half < w.two_runs ? w.run(1) + k : nullptr,
                                    w.n_stride, w.cols, depth, to, k == 0);
      else multiply_few_across<Ar, X>(a.count, blocks.a[0], weights, w.k_stride, w.cols, depth, to, k == 0);
    }
  }
  if constexpr (way == FewRows::squares)
    for (int64_t half = 0; half <= w.two_runs; ++half)
      columns_in_order(a.count, w.cols, blocks.tile + half * kTileCols / 2);
}

template <class Ar, class X, class W>
void multiply_tile(const TileRows<X, typename Ar::C>& a, const TileWeights<W>& w, bool batch_invariant,
                   Blocks<Ar>& blocks) {
  if constexpr (std::is_same_v<X, W>)  // prepack has rounded
    if (w.prepacked) return multiply_prepacked<Ar>(a, w, blocks);
  const bool few = a.count <= kFewRows, along = w.k_stride == 1;
  if (along && are_dots<Ar, W>(a.count, w.depth) && !batch_invariant)
    multiply_unpacked<FewRows::dots, Ar>(a, w, blocks);
  else if (few && along) multiply_unpacked<FewRows::squares, Ar>(a, w, blocks);
  else if (few) multiply_unpacked<FewRows::across, Ar>(a, w, blocks);
  else if (!along) multiply_packed<ManyRows::across, Ar>(a, w, blocks);
  else if (turns_of_block<Ar>(a.count, kPanel<Ar>, kBlockSteps) >= PanelBeside<Ar, X, W, false>::kPanelPieces)
    multiply_packed<ManyRows::along, Ar>(a, w, blocks);
  else multiply_packed<ManyRows::along_by_steps, Ar>(a, w, blocks);
}

template <class X, class W>
void grouped_gemm_tile(const GroupedGemmParams& p, const Tile& tile, void* partial_score, int64_t score_stride) {
  using Ar = Arithmetic<X>;
  using C = typename Ar::C;
  auto& blocks = Blocks<Ar>::of_thread();
  TileRows<X, C> a{.scaled = bool(p.a.scale), .count = tile.rows};
  find_rows(p.a, tile.row_begin, tile.rows, a.rows, a.scale);
  C* const share = p.grad_score ? static_cast<C*>(partial_score) + tile.col_begin / kTileCols : nullptr;
  if (share && p.score_bias && tile.col_begin == 0)
    add_bias_share(p, tile.expert, a.rows, tile.rows, blocks.tile, kTileRows * kTileCols,
                   share + tile.row_begin * score_stride, score_stride);
  if (tile.cols == 0) return;

  const bool gated = p.epilogue == Epilogue::activate && p.activation.gated;
  const bool interleaved = gated && p.activation.interleaved;  // gates and ups stand in one run
  const TileWeights<W> w{.data = static_cast<const W*>(p.weight.data) + tile.expert * p.weight.expert_stride,
                         .n_stride = p.weight.n_stride,
                         .k_stride = p.weight.k_stride,
                         .depth = p.k,
                         .first = interleaved ? 2 * tile.col_begin : tile.col_begin,
                         .ups = p.n / 2 + tile.col_begin,
                         .cols = interleaved ? 2 * tile.cols : tile.cols,
                         .two_runs = gated && !interleaved,
                         .prepacked = p.weight.prepacked};
  multiply_tile<Ar>(a, w, p.batch_invariant, blocks);
  if (interleaved) deinterleave_tile(tile.rows, tile.cols, blocks.tile);

  switch (p.epilogue) {
    case Epilogue::store: return store_tile<X>(p, tile, blocks.tile);
    case Epilogue::activate: return activate_tile<X>(p, tile, blocks.tile);
    case Epilogue::activate_backward: return activate_backward_tile<X>(p, tile, blocks.tile, share, score_stride);
  }
}

inline void grouped_gemm(const GroupedGemmParams& p, const Tile& tile, void* partial_score, int64_t score_stride) {
  visit_dtype(p.a.rows.dtype, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    if constexpr (sizeof(X) == 2)  // float32 weights are rounded to the rows' dtype while they are packed
      if (p.weight.dtype == Dtype::float32) return grouped_gemm_tile<X, float>(p, tile, partial_score, score_stride);
    grouped_gemm_tile<X, X>(p, tile, partial_score, score_stride);
  });
}

}  // namespace moe::MOE_ISA
