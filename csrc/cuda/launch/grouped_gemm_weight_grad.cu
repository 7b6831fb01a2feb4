// Starts the weight gradient: a block per expert and tile.
#include "cuda/kernels/grouped_gemm_weight_grad.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/gemm_config.h"
#include "cuda/launch/grouped_gemm_weight_grad.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

namespace {

template <class T, bool tensor_cores>
void start(const WeightGradLaunch& at, const Device& device) {
  using Shared = WeightGradShared<T, tensor_cores>;
  static_assert(sizeof(Shared) <= kSharedBytesOfEveryCard);
  launch({.grid = unsigned(at.p.num_experts * at.n_tiles * at.k_tiles),
          .block = unsigned(OuterProducts<T, tensor_cores>::kThreads),
          .shared_bytes = sizeof(Shared),
          .stream = device.stream(),
          .early = device.starts_early()},
         grouped_gemm_weight_grad_kernel<T, tensor_cores>, at);
}

}  // namespace

void grouped_gemm_weight_grad(const WeightGradParams& p, const Device& device) {
  float_type(p.out_dtype, "grouped_gemm_weight_grad");
  if (grouped_gemm_weight_grad_sm90(p, device)) return;
  const WeightGradLaunch at{.p = p,
                            .n_tiles = ceil_div(p.n, kGradCols),
                            .k_tiles = ceil_div(p.k, kGradCols),
                            .aligned_grad = has_aligned_rows(p.grad.rows),
                            .aligned_a = has_aligned_rows(p.a.rows),
                            .aligned_out = is_aligned(p.out) && p.k % 4 == 0};
  std::visit(
      [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (sizeof(T) == 4)
          if (!p.allow_tf32) return start<T, false>(at, device);
        start<T, true>(at, device);
      },
      float_type(p.a.rows.dtype, "grouped_gemm_weight_grad"));
}

}  // namespace moe
