// Additions that many threads make to one place. Integers only: their order does not show.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe::arch {

// The value before.
__device__ __forceinline__ int32_t fetch_add(int32_t* to, int32_t value) { return atomicAdd(to, value); }

__device__ __forceinline__ void add(int32_t* to, int32_t value) { atomicAdd(to, value); }
__device__ __forceinline__ void add(uint64_t* to, uint64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

__device__ __forceinline__ void set_bits(uint64_t* to, uint64_t bits) {
  atomicOr(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(bits));
}

}  // namespace moe::arch
