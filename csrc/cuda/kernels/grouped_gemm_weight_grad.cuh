// The weight gradient: out[e] = grad^T . a over the rows of expert e, a tile of out per block. Rows arrive in steps, a
// few of them ahead of the product; an expert without rows gets zeros.
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/outer_products.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kGradStages = 4;

template <class T, bool tensor_cores>
union WeightGradShared {
  struct {
    GradTile<T> grad, a;
  } stages[kGradStages];
  typename OuterProducts<T, tensor_cores>::Staging staging;
};

struct WeightGradLaunch {
  WeightGradParams p;
  int64_t n_tiles, k_tiles;                   // of an expert's gradient
  bool aligned_grad, aligned_a, aligned_out;  // may be read or written 16 bytes at a time
};

struct GradPlace {
  int64_t expert, n, k;
};

// Blocks that run together read the same few columns: eight tiles along N by as many along K as it takes.
__device__ __forceinline__ GradPlace grad_place(const WeightGradLaunch& at, int64_t block) {
  constexpr int64_t kBand = 8;
  const int64_t of_expert = at.n_tiles * at.k_tiles, i = block % of_expert;
  const int64_t first = i / (kBand * at.k_tiles) * kBand, band = min(kBand, at.n_tiles - first);
  const int64_t within = i % (kBand * at.k_tiles);
  return {block / of_expert, (first + within % band) * kGradCols, within / band * kGradCols};
}

// out[element ..] = or += values, of which the first `left` are wanted.
template <class S>
__device__ __forceinline__ void store_gradient(const WeightGradLaunch& at, int64_t element, int64_t left, Quad values) {
  S* const to = static_cast<S*>(at.p.out) + element;
  if (at.p.accumulate) {
    const auto old = load_values<S, 4>(to, left, at.aligned_out);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] += to_float(old[i]);
  }
  arch::Pack<S, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = from_float<S>(values[i]);
  store_values(to, out, left, at.aligned_out);
}

template <class T, bool tensor_cores>
__global__ void __launch_bounds__(OuterProducts<T, tensor_cores>::kThreads, OuterProducts<T, tensor_cores>::kBlocks)
    grouped_gemm_weight_grad_kernel(const __grid_constant__ WeightGradLaunch at) {
  take_turn();
  using Products = OuterProducts<T, tensor_cores>;
  using Loader = RowLoader<T, Products::kThreads>;
  auto& shared = arch::shared<WeightGradShared<T, tensor_cores>>();
  const WeightGradParams& p = at.p;
  const GradPlace tile = grad_place(at, blockIdx.x);
  const RowRange rows = rows_of_expert(p.offsets, tile.expert, p.num_rows);
  const int64_t steps = ceil_div(rows.end - rows.begin, kGradDepth<T>);
  if (steps == 0 && p.accumulate) return;

  Loader grad(p.grad, rows, tile.n, p.n, at.aligned_grad), a(p.a, rows, tile.k, p.k, at.aligned_a);
  const auto load = [&](int64_t step) {
    auto& stage = shared.stages[step % kGradStages];
    if (step < steps) grad.load(stage.grad), a.load(stage.a);
    arch::copy_async_commit();
  };
  Products products;

  for (int step = 0; step < kGradStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    auto& stage = shared.stages[step % kGradStages];
    arch::copy_async_wait<kGradStages - 2>();
    grad.scale(stage.grad, rows.begin + step * kGradDepth<T>);
    a.scale(stage.a, rows.begin + step * kGradDepth<T>);
    arch::sync_block();  // this step has landed, and no warp reads the step before it any more
    load(step + kGradStages - 1);
    products.add(stage.grad, stage.a);
  }

  arch::sync_block();  // no warp reads a step any more
  products.write(shared.staging, [&](int row, int col, const Quad& values) {
    const int64_t n = tile.n + row, k = tile.k + col, element = (tile.expert * p.n + n) * p.k + k;
    if (n >= p.n || k >= p.k) return;
    with_type(p.out_dtype, [&](auto zero) { store_gradient<decltype(zero)>(at, element, p.k - k, values); });
  });
}

}  // namespace moe
