// sm_90: boxes of a tensor to shared memory and back, by one thread.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-tensor
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/tensor_map.cuh"

namespace moe::arch {

// How long L2 should keep it: the policies that createpolicy makes for whole accesses.
enum class Keep : uint64_t { normal = 0x1000000000000000, shortly = 0x12f0000000000000, long_ = 0x14f0000000000000 };

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Bytes of global memory to L2, without waiting; address and count are multiples of 16.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-cp-async-bulk-prefetch
__device__ __forceinline__ void prefetch_l2(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

// The box at (x, y), x along the contiguous dimension, to shared memory, aligned to 128 bytes, swizzled to 1024. The
// barrier expects the bytes of the whole box, those outside the tensor included.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Barrier& landed, int x, int y,
                                         Keep keep = Keep::normal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&landed)), "r"(x), "r"(y), "l"(uint64_t(keep))
      : "memory");
}
__device__ __forceinline__ void tma_load(void* shared, const TensorMap& map, Barrier& landed, int x, int y, int z,
                                         Keep keep = Keep::normal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&landed)), "r"(x), "r"(y), "r"(z), "l"(uint64_t(keep))
      : "memory");
}

// To the same place in every block of the cluster whose bit is set, each of whose barriers gets the bytes.
__device__ __forceinline__ void tma_load_to(uint16_t blocks, void* shared, const TensorMap& map, Barrier& landed, int x,
                                            int y, Keep keep = Keep::normal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&landed)), "r"(x), "r"(y), "h"(blocks), "l"(uint64_t(keep))
      : "memory");
}
__device__ __forceinline__ void tma_load_to(uint16_t blocks, void* shared, const TensorMap& map, Barrier& landed, int x,
                                            int y, int z, Keep keep = Keep::normal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6, %7;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&landed)), "r"(x), "r"(y), "r"(z), "h"(blocks), "l"(uint64_t(keep))
      : "memory");
}

// What is in shared memory was written before a fence_async_proxy; elements outside the tensor stay away.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Ends a group of this thread's stores.
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most `pending` groups of this thread still read shared memory.
template <int pending>
__device__ __forceinline__ void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Waits until at most `pending` groups of this thread are not yet in global memory: before the thread ends.
template <int pending>
__device__ __forceinline__ void tma_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace moe::arch
