// sm_90: the multiply-accumulate of a warpgroup, operands in shared memory, beside the threads that asked for it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/copy_async.cuh"
#include "cuda/arch/wgmma_shapes.cuh"

namespace moe::arch {

// Before the first wgmma, and where registers of one were written or read in between.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a group of wgmmas.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` groups run; until then neither their operands nor their accumulators are touched.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// The compiler does not move accesses to the accumulators across this place: before a fence and after a wait.
template <int n>
__device__ __forceinline__ void wgmma_hold(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// An operand of 2-byte elements in shared memory, in 128-byte swizzled rows of 64: eight rows are an atom of 1024
// bytes, aligned to 1024. Offsets and address in units of 16 bytes.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
__device__ __forceinline__ uint64_t wgmma_operand(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t swizzle_128 = 1;
  return (shared_address(shared) & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | swizzle_128 << 62;
}

// Rows along K: [m or n, 64], atoms of eight m or n below each other. The next 16 of K are 32 bytes further.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-k-major
__device__ __forceinline__ uint64_t wgmma_along_k(const void* shared, uint32_t stride_bytes = 1024) {
  return wgmma_operand(shared, 16, stride_bytes);  // the leading offset is not read
}

// Rows along M or N: [k, 64], atoms of eight k below each other; `leading_bytes` lie between the first 64 of m or n and
// the next. The next 16 of K are 2 * stride_bytes further.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-mn-major
__device__ __forceinline__ uint64_t wgmma_across_k(const void* shared, uint32_t leading_bytes,
                                                   uint32_t stride_bytes = 1024) {
  return wgmma_operand(shared, leading_bytes, stride_bytes);
}

// The address stays below 2^18 bytes, so that nothing is carried beyond the lower word.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) {
  return (operand & 0xffffffff00000000) | uint32_t(uint32_t(operand) + (bytes >> 4));
}

// The same by so many times 16 bytes.
__device__ __forceinline__ uint64_t wgmma_advance_chunks(uint64_t operand, uint32_t chunks) {
  return (operand & 0xffffffff00000000) | uint32_t(uint32_t(operand) + chunks);
}

// d [64, n] += a . b; `accumulate` is false in the first product of a sum. See Wgmma.
template <class T, int n, bool a_across = false, bool b_across = false>
__device__ __forceinline__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  Wgmma<T, n>::template multiply<a_across, b_across>(d, a, b, accumulate);
}

}  // namespace moe::arch
