// sm_90: blocks that run together and reach each other's shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/copy_async.cuh"

namespace moe::arch {

// https://docs.nvidia.com/cuda/parallel-thread-execution/#special-registers-cluster-ctarank
__device__ __forceinline__ uint32_t block_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t blocks_in_cluster() {
  uint32_t count;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return count;
}

// All threads of all blocks arrive, and see behind the wait what the others wrote before.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-barrier-cluster
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void sync_cluster() {
  cluster_arrive();
  cluster_wait();
}

// The same place in the shared memory of another block of the cluster; the block must live while it is used.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-mapa
template <class T>
__device__ __forceinline__ T* in_block(T* shared, uint32_t block) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(block));
  return reinterpret_cast<T*>(there);
}

}  // namespace moe::arch
