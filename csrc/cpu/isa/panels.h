// Few rows times packed weights, bound by reading them, each panel a run of memory. Where the loop is short the
// processor looks far enough ahead on its own, best along several panels side by side; elsewhere lines are asked for,
// into L2, along one. An element's sum is that of multiply.h.
#pragma once

#include <algorithm>

#include "cpu/isa/multiply.h"
#include "cpu/isa/stream.h"

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

inline constexpr int kPanelBytesAhead = 6 << 10;  // between a line that is asked for and the one that is read

// What a step has of a column: values, and the Elements that they are, one, or two that are widened.
template <class Ar, class X>
inline constexpr int kStepValues = sizeof(typename Ar::Element) / sizeof(X);
template <class Ar, class X>
inline constexpr int kStepElements = kStepValues<Ar, X> / Ar::kDepth;

// The Elements that a step has of a vector's columns.
template <class Ar, class X>
MOE_INLINE void load_step(const X* from, Vec<typename Ar::Element>* to) {
  using Element = typename Ar::Element;
  if constexpr (kStepElements<Ar, X> == 1) {
    to[0] = load_vector<Element>(from);
  } else {
    const auto pair = load_vector<uint32_t>(from);
    if constexpr (std::is_same_v<X, bfloat16>) {
      to[0] = bit_cast<Vec<float>>(pair << 16);
      to[1] = bit_cast<Vec<float>>(pair & 0xffff0000u);
    } else {
      to[0] = to_compute<float, X>(convert<Packed<float, X>>(pair & 0xffffu));
      to[1] = to_compute<float, X>(convert<Packed<float, X>>(pair >> 16));
    }
  }
}

// tile[rows, columns] (+)= a[rows, steps] . panels[columns, steps], `vectors` of each panel from column `col` on.
template <class Ar, class X, int rows, int streams, int vectors>
void multiply_panels(const typename Ar::Element* a, const PackedPanel<X>* panels, int64_t first_step, int64_t steps,
                     int64_t col, typename Ar::C* tile) {
  using C = typename Ar::C;
  constexpr int kElements = kStepElements<Ar, X>, kOfStep = kStepBytes / sizeof(X);
  const X* from[streams];
  for (int s = 0; s < streams; ++s) from[s] = panels[s].data + first_step * kOfStep + col * kStepValues<Ar, X>;
  Vec<C> acc[rows][streams][vectors] = {};
  for (int64_t step = 0; step < steps; ++step, a += kElements) {
    Vec<typename Ar::Element> values[streams][vectors][kElements];
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s) {
      if constexpr (streams == 1)
        for (int line = 0; line < kStepBytes; line += kLine)
          __builtin_prefetch(reinterpret_cast<const char*>(from[s]) + kPanelBytesAhead + line, 0, 2);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) load_step<Ar>(from[s] + j * kLanes<C> * kStepValues<Ar, X>, values[s][j]);
      from[s] += kOfStep;
    }
#pragma GCC unroll 2
    for (int e = 0; e < kElements; ++e)
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const auto value = broadcast(a[i * RowsOfA<Ar>::kRowStride + e]);
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
          for (int j = 0; j < vectors; ++j) acc[i][s][j] = Ar::step(acc[i][s][j], value, values[s][j][e]);
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j)
        join_sum<C>(tile + i * kTileCols + panels[s].tile_col + col + j * kLanes<C>, acc[i][s][j], first_step == 0);
}

// The same from value `begin` to `end` of the reduction, in its blocks.
template <class Ar, class X, int rows, int streams>
void multiply_panel_blocks(const typename Ar::Element* a, int64_t block_size, const PackedPanel<X>* panels,
                           int64_t begin, int64_t end, typename Ar::C* tile) {
  constexpr int kOfPanel = kPanel<Ar> / kLanes<typename Ar::C>;
  constexpr int vectors = rows * kOfPanel <= kMicroRows * kMicroVectors ? kOfPanel : kMicroVectors;
  static_assert(streams == 1 || vectors == kOfPanel);  // several panels are taken whole
  for (int64_t k = begin; k < end || k == 0; k += kBlockDepth<Ar>, a += block_size)
    for (int64_t col = 0; col < panels->cols; col += vectors * kLanes<typename Ar::C>)
      multiply_panels<Ar, X, rows, streams, vectors>(
          a, panels, k / kStepValues<Ar, X>, ceil_div(min(end - k, kBlockDepth<Ar>), kStepValues<Ar, X>), col, tile);
}

// All panels of a tile, n rows of at most kMicroRows.
template <class Ar, class X, int rows = 1>
void multiply_few_panels(int64_t n, const typename Ar::Element* a, int64_t block_size, const PackedPanels<X>& panels,
                         int64_t begin, int64_t end, typename Ar::C* tile) {
  if constexpr (rows < kMicroRows) {
    if (n > rows) return multiply_few_panels<Ar, X, rows + 1>(n, a, block_size, panels, begin, end, tile);
  }
  // Several panels pay only while a step is short enough for the processor to look ahead.
  constexpr int kMost = rows <= 3 && kStepElements<Ar, X> == 1 ? 4 : 1;
  constexpr int kRoom = kMicroRows * kMicroCols<Ar> / (rows * kPanel<Ar>);  // panels whose sums the registers hold
  constexpr int streams = std::clamp(kRoom, 1, kMost);
  int64_t i = 0;
  for (; i + streams <= panels.count; i += streams)
    multiply_panel_blocks<Ar, X, rows, streams>(a, block_size, panels.panels + i, begin, end, tile);
  if constexpr (streams > 1)
    for (; i < panels.count; ++i)
      multiply_panel_blocks<Ar, X, rows, 1>(a, block_size, panels.panels + i, begin, end, tile);
}

}  // namespace moe::MOE_ISA
