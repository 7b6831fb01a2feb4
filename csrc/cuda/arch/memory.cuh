// Aligned accesses of several bytes at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe::arch {

// N values that are moved as one access.
template <class T, int n>
struct alignas(sizeof(T) * n) Pack {
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

// To global memory, 4, 8 or 16 bytes as one access: a plain store of a struct may be cut into its elements.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st
template <class P, class T>
__device__ __forceinline__ void store_global(T* to, const P& pack) {
  if constexpr (sizeof(P) == 16) {
    uint4 bits;
    __builtin_memcpy(&bits, &pack, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x),
                 "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else if constexpr (sizeof(P) == 8) {
    uint2 bits;
    __builtin_memcpy(&bits, &pack, 8);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(bits.x), "r"(bits.y)
                 : "memory");
  } else if constexpr (sizeof(P) == 4) {
    uint32_t bits;
    __builtin_memcpy(&bits, &pack, 4);
    asm volatile("st.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(bits) : "memory");
  } else {
    *reinterpret_cast<P*>(to) = pack;
  }
}

template <class P, class T>
__device__ __forceinline__ void store(T* to, const P& pack) {
  *reinterpret_cast<P*>(to) = pack;
}

}  // namespace moe::arch
