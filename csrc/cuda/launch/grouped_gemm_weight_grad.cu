// Starts the weight gradient: a block per expert and tile.
#include "cuda/kernels/grouped_gemm_weight_grad.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

void grouped_gemm_weight_grad(const WeightGradParams& p, const Device& device) {
  float_type(p.out_dtype, "grouped_gemm_weight_grad");
  const WeightGradLaunch at{.p = p,
                            .n_tiles = ceil_div(p.n, kGradTile),
                            .k_tiles = ceil_div(p.k, kGradTile),
                            .aligned_grad = has_aligned_rows(p.grad.rows),
                            .aligned_a = has_aligned_rows(p.a.rows),
                            .aligned_out = is_aligned(p.out) && p.k % 4 == 0};
  std::visit(
      [&](auto type) {
        using T = typename decltype(type)::type;
        launch({.grid = unsigned(p.num_experts * at.n_tiles * at.k_tiles),
                .block = unsigned(kGradThreads<T>),
                .shared_bytes = sizeof(WeightGradShared<T>),
                .stream = device.stream()},
               grouped_gemm_weight_grad<T>, at);
      },
      float_type(p.a.rows.dtype, "grouped_gemm_weight_grad"));
}

}  // namespace moe
