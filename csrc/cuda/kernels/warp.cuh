// What the lanes of a warp compute together; all of them call.
#pragma once

#include "cuda/arch/warp.cuh"

namespace moe {

__device__ __forceinline__ int warp_id() { return int(threadIdx.x / 32); }

// The same in every lane, and at every run: each step adds the halves of ever smaller groups.
template <class T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += arch::shuffle_xor(value, distance);
  return value;
}

// The sum of the lanes up to this one.
__device__ __forceinline__ int32_t scan_warp(int32_t value) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = arch::shuffle_up(value, distance);
    if (arch::lane_id() >= distance) value += below;
  }
  return value;
}

// Of the four lanes side by side: value i of lane q goes to value q of lane i.
template <class T>
__device__ __forceinline__ void transpose_quad(T (&values)[4]) {
  const bool odd = arch::lane_id() % 2, high = arch::lane_id() / 2 % 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const T got = arch::shuffle_xor(odd ? values[i] : values[i + 1], 1);
    (odd ? values[i] : values[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T got = arch::shuffle_xor(high ? values[i] : values[i + 2], 2);
    (high ? values[i] : values[i + 2]) = got;
  }
}

}  // namespace moe
