// Weights packed ahead (ExpertWeights in stages/params.h): panels are multiplied where they lie, whatever the number of
// rows. Blocks and sums are those of multiply.h, so that packing ahead changes no bit, except against dot_rows.h.
#pragma once

#include "cpu/isa/beside.h"
#include "cpu/isa/panels.h"

namespace moe::MOE_ISA {

// Values along the reduction, those that fill up the last step among them.
template <class Ar, class X>
int64_t depth_of_panel(const TileWeights<X>& w) {
  return ceil_div(w.depth, kStepValues<Ar, X>) * kStepValues<Ar, X>;
}

// The panels that hold `cols` weight rows from `begin` on, which is the first of a panel.
template <class Ar, class X>
void add_panels(const TileWeights<X>& w, int64_t begin, int64_t cols, int64_t tile_col, PackedPanels<X>& to) {
  const int64_t depth = depth_of_panel<Ar>(w);
  for (int64_t col = 0; col < cols; col += kPanel<Ar>)
    to.panels[to.count++] = {w.data + (begin + col) * depth, tile_col + col, min(cols - col, kPanel<Ar>)};
}

// Where ups follow all gates and begin within a panel, this many others stand before them.
template <class Ar, class X>
int64_t before_ups(const TileWeights<X>& w) {
  return w.two_runs ? w.ups % kPanel<Ar> : 0;
}

template <class Ar, class X>
PackedPanels<X> panels_of(const TileWeights<X>& w) {
  PackedPanels<X> panels;
  add_panels<Ar>(w, w.first, w.cols, 0, panels);
  const int64_t before = before_ups<Ar>(w);
  if (w.two_runs) add_panels<Ar>(w, w.ups - before, w.cols + before, kTileCols / 2, panels);
  return panels;
}

// Steps of a panel as the micro-kernel reads them: where they lie, or widened.
template <class Ar, class X>
const typename Ar::Element* panel_block(const X* from, int64_t depth, typename Ar::Element* buffer) {
  using Element = typename Ar::Element;
  if constexpr (kStepElements<Ar, X> == 1) {
    return reinterpret_cast<const Element*>(from);
  } else {
    constexpr int lanes = kLanes<float>, cols = kPanel<Ar>;
    for (int64_t k = 0; k < depth; k += 2)
      for (int col = 0; col < cols; col += lanes) {
        Vec<float> values[2];
        load_step<Ar>(from + k * cols + 2 * col, values);
        store_vector(buffer + k * cols + col, values[0]);
        store_vector(buffer + (k + 1) * cols + col, values[1]);
      }
    return buffer;
  }
}

// Blocks of A along the reduction that are packed at a time, as many as a tile's block has room for: fewer rows read
// longer runs of a panel, at best all of it.
template <class Ar>
struct RowBlocks {
  int64_t size, depth;  // Elements of one; values along the reduction of all

  explicit RowBlocks(int64_t rows) {
    const int64_t padded = ceil_div(rows, kMicroRows) * kMicroRows;
    size = padded * RowsOfA<Ar>::kRowStride;
    depth = kTileRows / padded * kBlockDepth<Ar>;
  }
};

template <class Ar, class X>
void multiply_few_prepacked(const TileRows<X, typename Ar::C>& a, const TileWeights<X>& w,
                            const PackedPanels<X>& panels, Blocks<Ar>& blocks) {
  const RowBlocks<Ar> packed(a.count);
  for (int64_t begin = 0; begin < w.depth || begin == 0; begin += packed.depth) {
    const int64_t end = min(begin + packed.depth, w.depth);
    pack_row_blocks<Ar>(a, begin, end, blocks.a[0], packed.size);
    multiply_few_panels<Ar>(a.count, blocks.a[0], packed.size, panels, begin, end, blocks.tile);
  }
}

// What is asked for is what is multiplied next: the next block of this panel, the first of the next one, or behind the
// last panel where the first one goes on. Where the rows of A are packed at once, it runs a block ahead from panel to
// panel, which lie one after another, by as much as each block is deep: 5 % faster than whole blocks where the last one
// is short (bf16, 16 rows, K = 1024). The next blocks of A are packed beside.
template <class Ar, class X>
void multiply_many_prepacked(const TileRows<X, typename Ar::C>& a, const TileWeights<X>& w,
                             const PackedPanels<X>& panels, Blocks<Ar>& blocks) {
  const RowBlocks<Ar> packed(a.count);
  const bool at_once = packed.depth >= w.depth;
  const int64_t full_depth = depth_of_panel<Ar>(w);
  const auto ahead = [](const X* from, int64_t depth) { return Ahead::of(from, 0, 1, depth * kPanel<Ar>); };
  const auto block_depth = [](int64_t begin, int64_t end) { return min(end - begin, kBlockDepth<Ar>); };
  fetch_ahead<2>(panels.panels[0].data, min(w.depth, kBlockDepth<Ar>) * kPanel<Ar>);  // comes while rows are packed
  pack_row_blocks<Ar>(a, 0, min(packed.depth, w.depth), blocks.a[0], packed.size);
  int which = 0;
  for (int64_t begin = 0; begin < w.depth || begin == 0; begin += packed.depth, which ^= 1) {
    const int64_t end = min(begin + packed.depth, w.depth), next_end = min(end + packed.depth, w.depth);
    const int64_t turns = panels.count * turns_of_block<Ar>(a.count, kPanel<Ar>, (end - begin) / Ar::kDepth);
    RowsBeside<Ar, X> rows(a, end, next_end, blocks.a[which ^ 1], packed.size, turns);
    for (int64_t i = 0; i < panels.count; ++i) {
      const auto& panel = panels.panels[i];
      const typename Ar::Element* block = blocks.a[which];
      for (int64_t k = begin; k < end || k == 0; k += kBlockDepth<Ar>, block += packed.size) {
        const int64_t depth = block_depth(k, end), steps = ceil_div(depth, Ar::kDepth);
        const int64_t next = k + kBlockDepth<Ar>;
        Ahead wanted{};
        if (next < end) wanted = ahead(panel.data + next * kPanel<Ar>, at_once ? depth : block_depth(next, end));
        else if (i + 1 < panels.count && at_once)
          wanted = ahead(panels.panels[i + 1].data + (next - full_depth) * kPanel<Ar>, depth);
        else if (i + 1 < panels.count)
          wanted = ahead(panels.panels[i + 1].data + begin * kPanel<Ar>, block_depth(begin, end));
        else wanted = ahead(panels.panels[0].data + end * kPanel<Ar>, block_depth(end, w.depth));
        const TileSums<typename Ar::C> sums{blocks.tile + panel.tile_col, k == 0};
        multiply_block<Ar, RowsOfA<Ar>>(block, panel_block<Ar>(panel.data + k * kPanel<Ar>, depth, blocks.b[0]),
                                        a.count, panel.cols, steps, kMicroCols<Ar>, sums, wanted, rows);
      }
    }
    rows.finish();
  }
}

template <class Ar, class X>
void multiply_prepacked(const TileRows<X, typename Ar::C>& a, const TileWeights<X>& w, Blocks<Ar>& blocks) {
  const auto panels = panels_of<Ar>(w);
  if (a.count <= kMicroRows) multiply_few_prepacked<Ar>(a, w, panels, blocks);
  else multiply_many_prepacked<Ar>(a, w, panels, blocks);
  if (const int64_t before = before_ups<Ar>(w))
    for (int64_t row = 0; row < a.count; ++row) {
      auto* const ups = blocks.tile + row * kTileCols + kTileCols / 2;
      std::memmove(ups, ups + before, w.cols * sizeof(*ups));
    }
}

}  // namespace moe::MOE_ISA
