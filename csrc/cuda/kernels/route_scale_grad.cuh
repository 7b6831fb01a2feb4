// The gradient of the expert scales: for each expert the terms of its slots, added up in float64 in the order of the
// slots. Chunks of slots are summed apart, by a thread for each expert, and then together.
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/arch/warp.cuh"
#include "cuda/kernels/math.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kScaleGradThreads = 256;

struct ScaleGradLaunch {
  const int32_t* chosen;  // [R]
  const double* terms;    // [R]; read where the expert is in range
  int64_t rows, experts, chunks, chunk_rows;
  double* partial;  // [chunks, E]
  float* out;       // [E]
};

struct ScaleGradShared {
  int32_t ids[kScaleGradThreads];
  double terms[kScaleGradThreads];
};

// Block b: the chunk b / experts in blocks.
__global__ void __launch_bounds__(kScaleGradThreads)
    scale_grad_of_chunks_kernel(const __grid_constant__ ScaleGradLaunch p) {
  take_turn();
  auto& shared = arch::shared<ScaleGradShared>();
  const int64_t expert_blocks = ceil_div(p.experts, kScaleGradThreads);
  const int64_t chunk = blockIdx.x / expert_blocks;
  const int64_t expert = blockIdx.x % expert_blocks * kScaleGradThreads + threadIdx.x;
  const int64_t begin = chunk * p.chunk_rows, end = begin + p.chunk_rows < p.rows ? begin + p.chunk_rows : p.rows;

  double sum = 0;
  for (int64_t base = begin; base < end; base += kScaleGradThreads) {
    const int64_t own = base + threadIdx.x;
    const int32_t id = own < end ? p.chosen[own] : -1;
    shared.ids[threadIdx.x] = id;
    shared.terms[threadIdx.x] = id >= 0 && id < p.experts ? p.terms[own] : 0;
    arch::sync_block();  // the slots are here
    for (int i = 0; i < kScaleGradThreads; ++i)
      if (shared.ids[i] == expert) sum += shared.terms[i];
    arch::sync_block();  // and read
  }
  if (expert < p.experts) p.partial[chunk * p.experts + expert] = sum;
}

__global__ void __launch_bounds__(kScaleGradThreads) scale_grad_kernel(const __grid_constant__ ScaleGradLaunch p) {
  take_turn();
  const int64_t expert = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (expert >= p.experts) return;
  double sum = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += p.partial[chunk * p.experts + expert];
  p.out[expert] = float(sum);
}

}  // namespace moe
