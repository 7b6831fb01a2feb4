// sm_90: order between the two ways to memory, that of loads and stores and that of TMA and wgmma.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar-fence
#pragma once

#include <cuda_runtime.h>

namespace moe::arch {

// What this thread has written to shared memory, or has seen there of others' stores and copy_async, is seen by the TMA
// stores and wgmmas that come after, its own and, behind a barrier, others'.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace moe::arch
