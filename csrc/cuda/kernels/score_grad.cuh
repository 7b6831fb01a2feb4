// The gradient of the route weights: grad_score[slot of r] = <dA', A> + <a[r], score_bias_e>. The backward epilogue
// left <dA', A> in parts, one per tile of columns; a warp adds those of a row in an order that is always the same.
#pragma once

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/gathered_rows.cuh"
#include "cuda/kernels/tile_walk.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kScoreGradThreads = 128;

// <a[r], bias of the expert>, this lane's terms of it.
template <class T>
MOE_INLINE float bias_share(const GroupedGemmParams& p, int64_t slot, int expert) {
  const int64_t row = row_at<T>(p.a, slot) - static_cast<const T*>(p.a.rows.data);
  const PairRows<T> a({.data = static_cast<T*>(p.a.rows.data) + row, .dtype = p.a.rows.dtype, .stride = 0});
  float sum = 0;
  for (int64_t k = 2 * arch::lane_id(); k < p.k; k += 64) {
    const int n = p.k - k > 1 ? 2 : 1;
    const float2 x = a.load(0, k, n);
    sum += x.x * read(p.score_bias, expert * p.k + k);
    if (n > 1) sum += x.y * read(p.score_bias, expert * p.k + k + 1);
  }
  return sum;
}

// grid: tiles of rows, one column. parts [num_rows, col_tiles]. Slots without a row keep what they have: zeros.
template <class T>
__global__ __launch_bounds__(kScoreGradThreads, 8) void score_grad_kernel(const __grid_constant__ GroupedGemmParams p,
                                                                          const __grid_constant__ TileGrid grid,
                                                                          const float* parts, int col_tiles) {
  take_turn();
  const int64_t slots = p.a.num_rows * p.a.width;
  const Lanes lanes{};
  TileWalk walk(grid);
  for (int index = int(blockIdx.x); walk.seek(index); index += int(gridDim.x)) {
    const Tile tile = walk.tile();
    if (tile.expert == p.num_experts) continue;
    for (int i = lanes.warp; i < tile.rows; i += lanes.warps) {
      const int64_t row = tile.row_begin + i, slot = p.a.row_slot ? p.a.row_slot[row] : row;
      float sum = 0;
      for (int part = arch::lane_id(); part < col_tiles; part += 32) sum += parts[row * col_tiles + part];
      if (p.score_bias.data) sum += bias_share<T>(p, slot_of(p.a, row), tile.expert);
      sum = sum_of_warp(sum);
      if (arch::lane_id() == 0 && slot >= 0 && slot < slots) static_cast<float*>(p.grad_score)[slot] = sum;
    }
  }
}

}  // namespace moe
