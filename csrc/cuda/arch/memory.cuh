// Aligned accesses of several bytes at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe::arch {

// N values that are moved as one access.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
  static constexpr int kSize = n;
  T values[n];

  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <class P, class T>
__device__ __forceinline__ P load(const T* from) {
  return *reinterpret_cast<const P*>(from);
}

// Global memory that no one writes during the kernel and that is read once: it need not stay in L1.
template <class P, class T>
__device__ __forceinline__ P load_streamed(const T* from) {
  P out;
  if constexpr (sizeof(P) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
    __builtin_memcpy(&out, &bits, 16);
  } else if constexpr (sizeof(P) == 8) {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(from));
    __builtin_memcpy(&out, &bits, 8);
  } else if constexpr (sizeof(P) == 4) {
    const uint32_t bits = __ldcs(reinterpret_cast<const uint32_t*>(from));
    __builtin_memcpy(&out, &bits, 4);
  } else {
    out = load<P>(from);
  }
  return out;
}

// To global memory, as one access: a plain store of a struct may be cut into its elements.
template <class P, class T>
__device__ __forceinline__ void store_global(T* to, const P& pack) {
  auto store_bits = [&](auto bits, auto* at) {
    __builtin_memcpy(&bits, &pack, sizeof bits);
    __stwb(at, bits);
  };
  if constexpr (sizeof(P) == 16) store_bits(uint4{}, reinterpret_cast<uint4*>(to));
  else if constexpr (sizeof(P) == 8) store_bits(uint2{}, reinterpret_cast<uint2*>(to));
  else if constexpr (sizeof(P) == 4) store_bits(uint32_t{}, reinterpret_cast<uint32_t*>(to));
  else *reinterpret_cast<P*>(to) = pack;
}

template <class P, class T>
__device__ __forceinline__ void store(T* to, const P& pack) {
  *reinterpret_cast<P*>(to) = pack;
}

}  // namespace moe::arch
