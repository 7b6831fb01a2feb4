// What the lanes of a warp say to each other. `lanes` is the mask of those that take part, and all of them do.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe::arch {

inline constexpr uint32_t kAllLanes = 0xffffffff;

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }

template <class T>
__device__ __forceinline__ T shuffle(T value, int source, uint32_t lanes = kAllLanes) {
  return __shfl_sync(lanes, value, source);
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int distance, uint32_t lanes = kAllLanes) {
  return __shfl_xor_sync(lanes, value, distance);
}

// The value of the lane `distance` below; lanes without one keep their own.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int distance, uint32_t lanes = kAllLanes) {
  return __shfl_up_sync(lanes, value, distance);
}

// The lanes whose predicate holds.
__device__ __forceinline__ uint32_t ballot(bool predicate, uint32_t lanes = kAllLanes) {
  return __ballot_sync(lanes, predicate);
}

// The lanes that hold the same value.
__device__ __forceinline__ uint32_t match(int32_t value, uint32_t lanes = kAllLanes) {
  return __match_any_sync(lanes, value);
}

// The largest and the smallest value of the lanes.
__device__ __forceinline__ int32_t reduce_max(int32_t value, uint32_t lanes = kAllLanes) {
  return __reduce_max_sync(lanes, value);
}
__device__ __forceinline__ int32_t reduce_min(int32_t value, uint32_t lanes = kAllLanes) {
  return __reduce_min_sync(lanes, value);
}

__device__ __forceinline__ void sync_warp(uint32_t lanes = kAllLanes) { __syncwarp(lanes); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __ffs(int(bits)) - 1; }  // -1 where there is none

}  // namespace moe::arch
