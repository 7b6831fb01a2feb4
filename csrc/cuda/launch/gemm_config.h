// Which tiles a GEMM is cut into: a pure function of the card and the problem.
#pragma once

#include <cstdint>

#include "cuda/kernels/gemm_config.h"
#include "stages/params.h"

namespace moe {

struct GemmProblem {
  Dtype dtype;
  int64_t rows, experts, n, k;
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

constexpr GemmConfig pick_config(int /*arch*/, const GemmProblem& problem) {
  if (problem.dtype == Dtype::float32) return problem.allow_tf32 && problem.direct ? kTf32Tiles : kFloatTiles;
  if (!problem.direct) return kConvertingTiles;
  return problem.rows > 96 * problem.experts ? kLargeTiles : kSmallTiles;
}

}  // namespace moe
