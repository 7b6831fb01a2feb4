// Weights packed ahead (ExpertWeights in stages/params.h): panels are multiplied where they lie, whatever the number of
// rows. Blocks and sums are those of multiply.h, so that packing ahead does not change a bit of a result.
#pragma once

#include "cpu/isa/beside.h"
#include "cpu/isa/panels.h"

namespace moe::MOE_ISA {

// A panel of a tile, from its first step on, and where its columns stand in the tile.
template <class X>
struct PackedPanel {
  const X* data;
  int64_t tile_col, cols;
};

template <class X>
struct PackedPanels {
  PackedPanel<X> panels[kTileCols / panel_columns(Dtype::float64) + 2];
  int64_t count = 0;
};

// Values along the reduction, those that fill up the last step among them.
template <class X>
int64_t depth_of_panel(const TileWeights<X>& w) {
  constexpr int64_t values = sizeof(X) == 2 ? 2 : 1;
  return ceil_div(w.depth, values) * values;
}

// The panels that hold `cols` weight rows from `begin` on, which is the first of a panel.
template <class Ar, class X>
void add_panels(const TileWeights<X>& w, int64_t begin, int64_t cols, int64_t tile_col, PackedPanels<X>& to) {
  const int64_t depth = depth_of_panel(w);
  for (int64_t col = 0; col < cols; col += kPanel<Ar>)
    to.panels[to.count++] = {w.data + (begin + col) * depth, tile_col + col, min(cols - col, kPanel<Ar>)};
}

// Where ups follow all gates and begin within a panel, this many others stand before them.
template <class Ar, class X>
int64_t before_ups(const TileWeights<X>& w) {
  return w.gated && w.at.step == 1 ? w.at.up % kPanel<Ar> : 0;
}

template <class Ar, class X>
PackedPanels<X> panels_of(const TileWeights<X>& w) {
  PackedPanels<X> panels;
  add_panels<Ar>(w, w.at.gate, w.interleaved() ? 2 * w.cols : w.cols, 0, panels);
  const int64_t before = before_ups<Ar>(w);
  if (w.gated && !w.interleaved()) add_panels<Ar>(w, w.at.up - before, w.cols + before, kTileCols / 2, panels);
  return panels;
}

// Steps of a panel as the micro-kernel reads them: where they lie, or widened.
template <class Ar, class X>
const typename Ar::Element* panel_block(const X* from, int64_t depth, typename Ar::Element* buffer) {
  using Element = typename Ar::Element;
  if constexpr (sizeof(X) * Ar::kDepth == sizeof(Element)) {
    return reinterpret_cast<const Element*>(from);
  } else {
    constexpr int lanes = kLanes<float>, cols = kPanel<Ar>;
    for (int64_t k = 0; k < depth; k += 2)
      for (int col = 0; col < cols; col += lanes) {
        const auto pair = load_vector<uint32_t>(from + k * cols + 2 * col);
        float* to = buffer + k * cols + col;
        if constexpr (std::is_same_v<X, bfloat16>) {
          store_vector(to, bit_cast<Vec<float>>(pair << 16));
          store_vector(to + cols, bit_cast<Vec<float>>(pair & 0xffff0000u));
        } else {
          store_vector(to, to_compute<float, X>(convert<Packed<float, X>>(pair & 0xffffu)));
          store_vector(to + cols, to_compute<float, X>(convert<Packed<float, X>>(pair >> 16)));
        }
      }
    return buffer;
  }
}

// Gates to the first half of each row of the tile, ups to the second, as the epilogue wants them.
template <class C>
void part_gates_from_ups(bool interleaved, int64_t before, int64_t rows, int64_t cols, C* tile) {
  constexpr int64_t half = kTileCols / 2;
  for (int64_t row = 0; row < rows; ++row, tile += kTileCols) {
    if (interleaved) {
      C ups[half];
      for (int64_t j = 0; j < cols; ++j) ups[j] = tile[2 * j + 1];
      for (int64_t j = 0; j < cols; ++j) tile[j] = tile[2 * j];
      std::memcpy(tile + half, ups, cols * sizeof(C));
    } else {
      std::memmove(tile + half, tile + half + before, cols * sizeof(C));
    }
  }
}

// The first panels, as far as they can be taken side by side: how many.
template <class Ar, class X>
int64_t multiply_side_by_side(const PackedPanels<X>& panels, int64_t begin, int64_t end, int64_t rows,
                              const typename Ar::Element* a, int64_t block_size, typename Ar::C* tile) {
  int64_t done = 0;
  if constexpr (sizeof(X) * Ar::kDepth == sizeof(typename Ar::Element)) {
    while (done < panels.count) {
      const int64_t left = min(panels.count - done, kMostStreams);
      const typename Ar::Element* block = a;
      int64_t taken = 0;
      for (int64_t k = begin; k < end || k == 0; k += kBlockDepth<Ar>, block += block_size) {
        Stream<Ar> streams[kMostStreams];
        for (int64_t s = 0; s < left; ++s) {
          const auto& panel = panels.panels[done + s];
          streams[s] = {panel_block<Ar>(panel.data + k * kPanel<Ar>, 0, nullptr), tile + panel.tile_col};
        }
        const int64_t steps = ceil_div(min(end - k, kBlockDepth<Ar>), Ar::kDepth);
        taken = multiply_some_panels<Ar>(rows, block, streams, left, steps, k == 0);
      }
      if (taken == 0) break;
      done += taken;
    }
  }
  return done;
}

// As many blocks of A along the reduction are packed at a time as a tile's block has room for: fewer rows read longer
// runs of a panel, at best all of it; then what is asked for ahead is what lies one block further, in this panel or
// the next. The next blocks of A are packed beside.
template <class Ar, class X>
void multiply_prepacked(const TileRows<X, typename Ar::C>& a, const TileWeights<X>& w, Blocks<Ar>& blocks) {
  const auto panels = panels_of<Ar>(w);
  const int64_t block_rows = ceil_div(a.count, kMicroRows) * kMicroRows,
                block_size = block_rows * RowsOfA<Ar>::kRowStride;
  const int64_t packed_depth = kTileRows / block_rows * kBlockDepth<Ar>;
  const bool at_once = packed_depth >= w.depth;
  const int64_t full_depth = depth_of_panel(w);
  // Memory as rows of one line for each turn, since of each row a line is asked for at a turn.
  const auto ahead = [](const X* from, int64_t depth, int64_t steps) -> Ahead {
    const int64_t bytes = depth * kPanel<Ar> * int64_t(sizeof(X)), run = ceil_div(steps, kTurnSteps) * 64;
    return {reinterpret_cast<const char*>(from), run, ceil_div(bytes, run), run};
  };
  pack_row_blocks<Ar>(a, 0, min(packed_depth, w.depth), blocks.a[0], block_size);
  int which = 0;
  for (int64_t begin = 0; begin < w.depth || begin == 0; begin += packed_depth, which ^= 1) {
    const int64_t end = min(begin + packed_depth, w.depth), next_end = min(end + packed_depth, w.depth);
    const int64_t done =
        multiply_side_by_side<Ar>(panels, begin, end, a.count, blocks.a[which], block_size, blocks.tile);
    const int64_t turns = (panels.count - done) * turns_of_block<Ar>(a.count, kPanel<Ar>, (end - begin) / Ar::kDepth);
    RowsBeside<Ar, X> rows(a, end, next_end, blocks.a[which ^ 1], block_size, turns);
    for (int64_t i = done; i < panels.count; ++i) {
      const auto& panel = panels.panels[i];
      const typename Ar::Element* block = blocks.a[which];
      for (int64_t k = begin; k < end || k == 0; k += kBlockDepth<Ar>, block += block_size) {
        const int64_t depth = min(end - k, kBlockDepth<Ar>), steps = ceil_div(depth, Ar::kDepth);
        const int64_t next = k + kBlockDepth<Ar>;
        Ahead wanted{};
        if (next < end) wanted = ahead(panel.data + next * kPanel<Ar>, depth, steps);
        else if (i + 1 < panels.count && depth)
          wanted = ahead(panels.panels[i + 1].data + (at_once ? next - full_depth : begin) * kPanel<Ar>, depth, steps);
        multiply_block<Ar, RowsOfA<Ar>>(block, panel_block<Ar>(panel.data + k * kPanel<Ar>, depth, blocks.b[0]),
                                        a.count, panel.cols, steps, blocks.tile + panel.tile_col, k == 0, wanted, rows);
      }
    }
    rows.finish();
  }
  const int64_t before = before_ups<Ar>(w);
  if (w.interleaved() || before) part_gates_from_ups(w.interleaved(), before, a.count, w.cols, blocks.tile);
}

}  // namespace moe::MOE_ISA
