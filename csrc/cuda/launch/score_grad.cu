// Starts the sum of the score gradient's parts.
#include "cuda/kernels/score_grad.cuh"

#include <algorithm>

#include "cuda/arch/launch.cuh"
#include "cuda/launch/grouped_gemm.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

void sum_score_gradients(const GroupedGemmParams& p, const float* parts, int col_tiles, const Device& device) {
  const TileGrid grid{.offsets = p.offsets,
                      .num_experts = int(p.num_experts),
                      .num_rows = p.num_rows,
                      .num_cols = 1,
                      .rows = 32,
                      .cols = 1};
  const int blocks = std::min(grid.most_tiles(), device.processors() * 16);
  std::visit(
      [&](auto type) {
        launch({.grid = unsigned(blocks), .block = kScoreGradThreads, .stream = device.stream()},
               score_grad_kernel<typename decltype(type)::type>, p, grid, parts, col_tiles);
      },
      float_type(p.a.rows.dtype, "grouped_gemm"));
}

}  // namespace moe
