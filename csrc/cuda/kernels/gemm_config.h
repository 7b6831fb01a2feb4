// The shape of a GEMM kernel's work: data, chosen by launch/gemm_config.h.
#pragma once

namespace moe {

// A block multiplies tiles [rows, depth] and [cols, depth], `stages` of them in shared memory at a time; its warps
// share the tile [rows, cols] of the result as a grid warp_rows x warp_cols.
struct GemmConfig {
  int rows, cols, depth, stages;
  int warp_rows, warp_cols;
  int blocks;  // per processor, so that one's epilogue runs beside another's products
  bool tensor_cores = true;

  constexpr int threads() const { return 32 * warp_rows * warp_cols; }
  constexpr bool operator==(const GemmConfig&) const = default;
};

}  // namespace moe
