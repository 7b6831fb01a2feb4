// The ragged-M grouped GEMM on tensor cores: out[r] = epilogue(a[r] . W_e^T + bias_e). Blocks walk over tiles; steps of
// the reduction stream through a ring of stages by asynchronous copies, warps multiply them from there, and the
// products go through the same shared memory to the epilogue.
#pragma once

#include <type_traits>

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/epilogue.cuh"

namespace moe {

template <class A, class B, class Config>
struct GemmShared {
  static constexpr GemmConfig config = Config::value;
  static constexpr int kThreads = config.threads();

  struct Stage {
    typename A::Shared a;
    typename B::Shared b;
  };
  union {
    Stage stages[config.stages];
    Products<config.rows, config.cols> products;
  };
  float bias[config.cols];
};

// A warp's part of the products: [kRows, kCols], in fragments of mma_16x8x16.
template <class T, class Config>
class WarpProducts {
 public:
  static constexpr GemmConfig config = Config::value;
  static constexpr int kRows = config.rows / config.warp_rows, kCols = config.cols / config.warp_cols;

  // += a . b of one step of the reduction.
  template <bool transposed, class A, class B>
  MOE_INLINE void multiply(A& a, B& b) {
#pragma unroll
    for (int k = 0; k < config.depth; k += 16) {
      uint32_t rows[kRows / 16][4], cols[kCols / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) load_a(rows[i], a, first_row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kCols / 16; ++j) {
        if constexpr (transposed) load_b_transposed(cols[j], b, first_col() + 16 * j, k);
        else load_b(cols[j], b, first_col() + 16 * j, k);
      }
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
          const uint32_t pair[2] = {cols[j / 2][j % 2 * 2], cols[j / 2][j % 2 * 2 + 1]};
          arch::mma_16x8x16<T>(values_[i][j], rows[i], pair);
        }
    }
  }

  MOE_INLINE void store(Products<config.rows, config.cols>& to, const float* bias) const {
    const int row = first_row() + arch::lane_id() / 4, col = first_col() + arch::lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const auto add = arch::load<float2>(bias + col + 8 * j);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          arch::store(to.at(row + 16 * i + 8 * half, col + 8 * j),
                      float2{values_[i][j][2 * half] + add.x, values_[i][j][2 * half + 1] + add.y});
    }
  }

 private:
  static MOE_INLINE int first_row() { return int(threadIdx.x) / 32 / config.warp_cols * kRows; }
  static MOE_INLINE int first_col() { return int(threadIdx.x) / 32 % config.warp_cols * kCols; }

  float values_[kRows / 16][kCols / 8][4] = {};
};

// The steps of a reduction of this depth, through the ring of stages.
template <bool transposed, class Shared, class A, class B, class Products>
MOE_INLINE void multiply_tile(Shared& shared, const A& a, const B& b, int64_t depth, Products& products) {
  constexpr GemmConfig config = Shared::config;
  const int steps = int((depth + config.depth - 1) / config.depth);
  const auto load = [&](int step) {
    if (step < steps) {
      const int64_t k = int64_t(step) * config.depth;
      a.load(shared.stages[step % config.stages].a, k, depth - k);
      b.load(shared.stages[step % config.stages].b, k, depth - k);
    }
    arch::copy_async_commit();
  };
  for (int step = 0; step < config.stages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    arch::copy_async_wait<config.stages - 2>();
    arch::sync_block();  // this step has landed, and the one before has been read by all
    load(step + config.stages - 1);
    products.template multiply<transposed>(shared.stages[step % config.stages].a,
                                           shared.stages[step % config.stages].b);
  }
  arch::copy_async_wait<0>();
}

// direct: the operands can be copied as they lie. partial_score [num_rows, tiles of columns]: see the epilogue.
template <class T, class Config, bool k_major, bool direct>
__global__ __launch_bounds__(Config::value.threads(),
                             Config::value.blocks) void grouped_gemm_kernel(const __grid_constant__ GroupedGemmParams p,
                                                                            const __grid_constant__ TileGrid grid,
                                                                            float* partial_score) {
  constexpr GemmConfig config = Config::value;
  using A = RowTiles<T, Config, direct>;
  using B = WeightTiles<T, Config, k_major, direct>;
  using Shared = GemmShared<A, B, Config>;
  auto& shared = arch::shared<Shared>();

  TileWalk walk(grid);
  for (int64_t index = blockIdx.x; walk.seek(index); index += gridDim.x) {
    const Tile tile = walk.tile();
    if (tile.expert == p.num_experts) {
      zero_tile<T>(p, tile);
      continue;
    }
    if (tile.cols == 0) continue;  // no columns, no products
    const WeightColumns columns = weight_columns(p, tile, config.cols);
    for (int col = int(threadIdx.x); col < config.cols; col += Shared::kThreads)
      shared.bias[col] = p.bias.data ? read(p.bias, tile.expert * p.n + columns.template at<config.cols>(col)) : 0;

    WarpProducts<T, Config> products;
    multiply_tile<!k_major>(shared, A(p, tile), B(p, tile), p.k, products);
    arch::sync_block();  // the last stages are read, the biases written
    products.store(shared.products, shared.bias);
    arch::sync_block();  // the products are written
    finish_tile<T>(p, tile, shared.products, partial_score, grid.col_tiles());
    arch::sync_block();  // and read, before the next tile's operands take their place
  }
}

}  // namespace moe
