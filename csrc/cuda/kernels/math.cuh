// Numbers in kernels: every element type as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "cuda/arch/memory.cuh"
#include "stages/params.h"

#define MOE_INLINE __device__ __forceinline__

namespace moe {

using Quad = arch::Pack<float, 4>;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
MOE_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

MOE_INLINE float to_float(float x) { return x; }
MOE_INLINE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
MOE_INLINE float to_float(__half x) { return __half2float(x); }

// The nearest T.
template <class T>
MOE_INLINE T from_float(float x);
template <>
MOE_INLINE float from_float<float>(float x) {
  return x;
}
template <>
MOE_INLINE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
MOE_INLINE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <class T>
inline constexpr Dtype dtype_of = Dtype::float32;
template <>
inline constexpr Dtype dtype_of<__nv_bfloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype dtype_of<__half> = Dtype::float16;

// f(T{}) for the element type T; float64 has no kernels.
template <class F>
MOE_INLINE void with_type(Dtype dtype, const F& f) {
  if (dtype == Dtype::float32) f(float{});
  else if (dtype == Dtype::bfloat16) f(__nv_bfloat16{});
  else f(__half{});
}

// One value of a vector of any dtype.
MOE_INLINE float read(const Vector& vector, int64_t i) {
  switch (vector.dtype) {
    case Dtype::float32: return static_cast<const float*>(vector.data)[i];
    case Dtype::bfloat16: return to_float(static_cast<const __nv_bfloat16*>(vector.data)[i]);
    case Dtype::float16: return to_float(static_cast<const __half*>(vector.data)[i]);
    case Dtype::float64: return float(static_cast<const double*>(vector.data)[i]);
  }
  return 0;
}

MOE_INLINE void write(void* vector, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::float32: static_cast<float*>(vector)[i] = value; break;
    case Dtype::bfloat16: static_cast<__nv_bfloat16*>(vector)[i] = from_float<__nv_bfloat16>(value); break;
    case Dtype::float16: static_cast<__half*>(vector)[i] = from_float<__half>(value); break;
    case Dtype::float64: static_cast<double*>(vector)[i] = double(value); break;
  }
}

}  // namespace moe
