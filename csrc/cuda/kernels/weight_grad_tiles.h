// The shape of a weight gradient's work on sm_90a: data, chosen by launch/weight_grad_tiles.h.
#pragma once

namespace moe {

// A block computes tiles [n, k] of an expert's gradient from steps of `depth` rows, `stages` of them in shared memory
// at a time. Two warpgroups share the n of a tile.
struct WeightGradTiles {
  int n, k, depth, stages;

  static constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  constexpr bool operator==(const WeightGradTiles&) const = default;
};

// 128 sums a thread either way. Rows that are gathered are better the narrow side: their copies cost instructions.
inline constexpr WeightGradTiles kWideGradTiles{.n = 128, .k = 256, .depth = 64, .stages = 4};
inline constexpr WeightGradTiles kTallGradTiles{.n = 256, .k = 128, .depth = 64, .stages = 4};
inline constexpr WeightGradTiles kSquareGradTiles{.n = 128, .k = 128, .depth = 64, .stages = 4};

// As types, for kernels.
struct WideGradTiles {
  static constexpr WeightGradTiles value = kWideGradTiles;
};
struct TallGradTiles {
  static constexpr WeightGradTiles value = kTallGradTiles;
};
struct SquareGradTiles {
  static constexpr WeightGradTiles value = kSquareGradTiles;
};

}  // namespace moe
