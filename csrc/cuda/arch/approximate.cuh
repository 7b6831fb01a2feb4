// What the processor has an instruction for and C++ only slower and more accurate functions: 16 results a cycle.
// Numbers below 2^-126, arguments and results, count as zeros of their sign.
#pragma once

#include <cuda_runtime.h>

namespace moe::arch {

// 2^x, within 2 units in the last place; inf above 128.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2
__device__ __forceinline__ float approximate_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// 1 / x, within a unit in the last place; infinities and zeros become each other.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-rcp
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

}  // namespace moe::arch
