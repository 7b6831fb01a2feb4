// sm_90: registers change hands between the warpgroups of a block.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#miscellaneous-instructions-setmaxnreg
#pragma once

#include <cuda_runtime.h>

namespace moe::arch {

// By all warps of a warpgroup; count is a multiple of 8 in 24..256. take_registers waits until they are free.
template <int count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace moe::arch
