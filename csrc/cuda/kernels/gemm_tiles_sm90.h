// The shape of a ragged-M GEMM's work on sm_90a: data, chosen by launch/gemm_tiles_sm90.h.
#pragma once

namespace moe {

// A block multiplies tiles [rows, depth] and [cols, depth], `stages` of them in shared memory at a time. Its two
// warpgroups of consumers share a tile of the result, 64 rows or a multiple of them each, or take turns with whole
// ones, so that one's epilogue runs beside the other's products.
struct HopperTiles {
  int rows, cols, stages;
  bool in_turns;

  static constexpr int kDepth = 64, kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // a thread

  constexpr int consumer_rows() const { return in_turns ? rows : rows / kConsumers; }
  constexpr bool operator==(const HopperTiles&) const = default;
};

// 128 sums a thread either way.
inline constexpr HopperTiles kSharedTiles{.rows = 128, .cols = 256, .stages = 4, .in_turns = false};
inline constexpr HopperTiles kTilesInTurns{.rows = 128, .cols = 128, .stages = 6, .in_turns = true};

// As types, for kernels.
struct SharedTiles {
  static constexpr HopperTiles value = kSharedTiles;
};
struct TilesInTurns {
  static constexpr HopperTiles value = kTilesInTurns;
};

}  // namespace moe
