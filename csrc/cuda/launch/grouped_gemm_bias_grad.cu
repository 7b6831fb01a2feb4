// Starts the bias gradient: a block per expert and line of columns.
#include "cuda/kernels/grouped_gemm_bias_grad.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

void grouped_gemm_bias_grad(const BiasGradParams& p, const Device& device) {
  float_type(p.out_dtype, "grouped_gemm_bias_grad");
  std::visit(
      [&](auto type) {
        using T = typename decltype(type)::type;
        const int64_t col_blocks = ceil_div(p.n, kBiasGradCols<T>);
        launch({.grid = unsigned(p.num_experts * col_blocks),
                .block = kBiasGradThreads,
                .shared_bytes = sizeof(BiasGradShared<T>),
                .stream = device.stream(),
                .early = device.starts_early()},
               grouped_gemm_bias_grad_kernel<T>,
               BiasGradLaunch{.p = p, .col_blocks = col_blocks, .aligned = has_aligned_rows(p.grad.rows)});
      },
      float_type(p.grad.rows.dtype, "grouped_gemm_bias_grad"));
}

}  // namespace moe
