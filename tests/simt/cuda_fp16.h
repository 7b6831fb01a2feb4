// float16, by the compiler's own type.
#pragma once

#include <cuda_runtime.h>

#include <bit>

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;
  __half(float x) : bits(std::bit_cast<uint16_t>(_Float16(x))) {}
  operator float() const {  // what the compiler's own conversion does, without its call
    const float magnitude = std::bit_cast<float>(uint32_t(bits & 0x7fff) << 13) * 0x1p112f;
    const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | uint32_t(bits & 0x8000) << 16);
  }
};

inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
