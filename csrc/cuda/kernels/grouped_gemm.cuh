// The ragged-M grouped GEMM: out[r] = epilogue(a[r] . W_e^T + bias_e). Blocks walk over tiles; steps of
// the reduction stream through a ring of stages by asynchronous copies, warps multiply them from there, and the
// products go through the same shared memory to the epilogue.
#pragma once

#include <type_traits>

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/gemm_operands.cuh"
#include "cuda/kernels/inner_products.cuh"
#include "cuda/kernels/turn.cuh"

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

// The steps of a reduction of this depth, through the ring of stages.
template <class Shared, class A, class B, class Products>
MOE_INLINE void multiply_tile(Shared& shared, const A& a, const B& b, int64_t depth, Products& products) {
  constexpr GemmConfig config = Shared::config;
  const int steps = int(ceil_div(depth, config.depth));
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
    products.multiply(shared.stages[step % config.stages].a, shared.stages[step % config.stages].b);
  }
  arch::copy_async_wait<0>();
}

// direct: the operands can be copied as they lie. parts [num_rows, tiles of columns]: of the score gradient, see the
// epilogue.
template <class T, class Config, bool k_major, bool direct>
__global__ __launch_bounds__(Config::value.threads(),
                             Config::value.blocks) void grouped_gemm_kernel(const __grid_constant__ GroupedGemmParams p,
                                                                            const __grid_constant__ TileGrid grid,
                                                                            float* parts) {
  take_turn();
  constexpr GemmConfig config = Config::value;
  using A = RowTiles<T, Config, direct>;
  using B = WeightTiles<T, Config, k_major, direct>;
  using Shared = GemmShared<A, B, Config>;
  auto& shared = arch::shared<Shared>();

  TileWalk walk(grid);
  for (int index = int(blockIdx.x); walk.seek(index); index += int(gridDim.x)) {
    const Tile tile = walk.tile();
    if (tile.expert == p.num_experts) {
      zero_tile<T>(p, tile);
      continue;
    }
    if (tile.cols == 0) continue;  // no columns, no products
    const WeightColumns columns = weight_columns(p, tile, config.cols);
    for (int col = int(threadIdx.x); col < config.cols; col += Shared::kThreads)
      shared.bias[col] = p.bias.data ? read(p.bias, tile.expert * p.n + columns.template at<config.cols>(col)) : 0;

    InnerProducts<T, Config, k_major> products;
    multiply_tile(shared, A(p, tile), B(p, tile), p.k, products);
    arch::sync_block();  // the last stages are read, the biases written
    products.store(shared.products, shared.bias);
    arch::sync_block();  // the products are written
    finish_tile<T>(p, tile, shared.products, parts, grid.col_tiles());
    arch::sync_block();  // and read, before the next tile's operands take their place
  }
}

}  // namespace moe
