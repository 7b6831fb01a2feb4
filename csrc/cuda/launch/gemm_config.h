// Which tiles a GEMM is cut into: a pure function of the card's size and the problem. An element is summed in the same
// order whatever is chosen, so that only TF32 changes bits. The generation does not count: every card from sm_80 on has
// the shared memory for a block, and blocks that find no room beside others come after them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/gemm_config.h"
#include "stages/params.h"

namespace moe {

// What a block may have of shared memory on sm_86, sm_89 and sm_120; the others give more.
// https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
inline constexpr int64_t kSharedBytesOfEveryCard = 99 * 1024;

struct GemmProblem {
  Dtype dtype;
  int64_t rows, experts, n;
  bool direct;  // both operands can be copied as they lie
  bool allow_tf32 = false;
};

// Warps of [64, 64], two blocks on a processor: the tensor cores, not shared memory, bound the loop.
inline constexpr GemmConfig kLargeTiles{
    .rows = 128, .cols = 128, .depth = 32, .stages = 4, .warp_rows = 2, .warp_cols = 2, .blocks = 2};
// Experts with few rows: less is wasted behind their last row, and the weights stream.
inline constexpr GemmConfig kSmallTiles{
    .rows = 64, .cols = 128, .depth = 32, .stages = 4, .warp_rows = 2, .warp_cols = 2, .blocks = 3};

// Operands that are converted, or not aligned, pass through registers.
inline constexpr GemmConfig kConvertingTiles{
    .rows = 64, .cols = 128, .depth = 32, .stages = 4, .warp_rows = 2, .warp_cols = 2, .blocks = 2};
// Float32: a thread's [8, 8] products, twice, in registers.
inline constexpr GemmConfig kFloatTiles{.rows = 64,
                                        .cols = 128,
                                        .depth = 16,
                                        .stages = 4,
                                        .warp_rows = 2,
                                        .warp_cols = 2,
                                        .blocks = 2,
                                        .tensor_cores = false};
inline constexpr GemmConfig kTf32Tiles{
    .rows = 128, .cols = 128, .depth = 16, .stages = 4, .warp_rows = 2, .warp_cols = 2, .blocks = 2};

// As types, for kernels: a kernel cannot take an aggregate as a template argument (nvcc 13.0's stubs do not compile).
struct LargeTiles {
  static constexpr GemmConfig value = kLargeTiles;
};
struct SmallTiles {
  static constexpr GemmConfig value = kSmallTiles;
};
struct ConvertingTiles {
  static constexpr GemmConfig value = kConvertingTiles;
};
struct Tf32Tiles {
  static constexpr GemmConfig value = kTf32Tiles;
};
struct FloatTiles {
  static constexpr GemmConfig value = kFloatTiles;
};

// Rows of tiles that the busiest processor multiplies, where every expert wastes half a tile behind its last row.
constexpr int64_t rows_in_turn(const GemmConfig& tiles, const GemmProblem& problem, int processors) {
  const auto ratio = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t wasted = std::min(problem.experts, problem.rows) * tiles.rows;
  const int64_t row_tiles = ratio(2 * problem.rows + wasted, 2 * tiles.rows);
  return ratio(row_tiles * ratio(problem.n, tiles.cols), processors) * tiles.rows;
}

// A row of small tiles is taken to cost a quarter more than one of large tiles, which fetch two thirds of the bytes for
// a product; to be measured. Where a card has many tiles of either, the large ones win from 96 rows per expert on.
constexpr GemmConfig pick_config(int processors, const GemmProblem& problem) {
  if (problem.dtype == Dtype::float32) return problem.allow_tf32 && problem.direct ? kTf32Tiles : kFloatTiles;
  if (!problem.direct) return kConvertingTiles;
  const int64_t large = rows_in_turn(kLargeTiles, problem, processors);
  const int64_t small = rows_in_turn(kSmallTiles, problem, processors);
  return 4 * large < 5 * small ? kLargeTiles : kSmallTiles;
}

}  // namespace moe
