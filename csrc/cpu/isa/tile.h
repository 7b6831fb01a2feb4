// What a tile of the ragged-M product multiplies, and the memory in which tiles of both products are computed.
#pragma once

#include "cpu/isa/pack.h"
#include "cpu/scratch.h"

namespace moe::MOE_ISA {

template <class Ar>
struct Blocks {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  // Two of each operand: one is multiplied while the other is packed. Both of B together hold a tile's columns.
  alignas(64) Element a[2][kTileRows * RowsOfA<Ar>::kRowStride];
  alignas(64) Element b[2][kTileCols / 2 * kBlockSteps];
  alignas(64) C tile[kTileRows * kTileCols];

  static Blocks& of_thread() { return *static_cast<Blocks*>(scratch(sizeof(Blocks))); }
};

// The rows of A that a tile multiplies.
template <class X, class C>
struct TileRows {
  const X* rows[kTileRows];
  C scale[kTileRows];
  bool scaled;
  int64_t count;
};

// The weights that a tile multiplies: `cols` rows of an expert from `first` on. Two runs where gates and ups lie apart:
// gates from `first` on for the first half of the tile, as many ups from `ups` on for the second.
template <class W>
struct TileWeights {
  const W* data;
  int64_t n_stride, k_stride, depth, first, ups, cols;
  bool two_runs, prepacked;

  const W* run(int64_t half) const { return data + (half ? ups : first) * n_stride; }
};

}  // namespace moe::MOE_ISA
