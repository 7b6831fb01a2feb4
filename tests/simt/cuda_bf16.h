// bfloat16: the upper half of a float.
#pragma once

#include <cuda_runtime.h>

#include <bit>

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;

  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {  // to the nearest, ties to even; NaN as the hardware writes it
    const uint32_t u = std::bit_cast<uint32_t>(x);
    bits = std::isnan(x) ? 0x7fff : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
