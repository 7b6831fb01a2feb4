// sm_90: a grid that starts before the one before it in the stream has ended (Launch::early); nothing below sm_90.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
#pragma once

#include <cuda_runtime.h>

namespace moe::arch {

// Before the first access to what an earlier grid writes or reads: waits until all of those have ended.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next grid may start when every block has said so or has ended.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace moe::arch
