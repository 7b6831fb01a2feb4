// Vectors of one instruction set, written with the compiler's vector extensions so that one source serves all of them.
// kernels.cpp is compiled once per instruction set: MOE_ISA names its namespace (so that no inline function compiled
// for a newer processor can be linked into an older one's path) and MOE_VECTOR_BYTES the width of a register.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "stages/params.h"

#define MOE_INLINE inline __attribute__((always_inline))

namespace moe::MOE_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T, int n>
struct VectorType {
  typedef T type __attribute__((vector_size(n * sizeof(T)), may_alias));
};

template <class T>
inline constexpr int kLanes = MOE_VECTOR_BYTES / int(sizeof(T));

template <class T, int n = kLanes<T>>
using Vec = typename VectorType<T, n>::type;  // n values of T

// The integer of a float's size, for bit tricks and masks.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class To, class From>
MOE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

template <class C>
MOE_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};
}

// b where either is NaN. If one of them is a constant, gcc 12 compares and blends where one instruction would do.
template <class T>
MOE_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<Vec<T>>(_mm512_maskz_max_ps(-1, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<Vec<T>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#endif
  return a > b ? a : b;
}
template <class T>
MOE_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<Vec<T>>(_mm512_maskz_min_ps(-1, bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<Vec<T>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#endif
  return a < b ? a : b;
}

// The type a product is computed and accumulated in.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// kLanes<C> values of a storage type, still in that type.
template <class C, class S>
using Packed = Vec<std::conditional_t<sizeof(S) == 2, uint16_t, S>, kLanes<C>>;

// Conversions to and from whole vectors. __builtin_convertvector says the same, but gcc 12 makes of one AVX-512
// instruction two of half the width, an extraction and an insertion.
#ifdef __AVX512F__
MOE_INLINE Vec<uint32_t, 16> convert(Vec<uint16_t, 16> v, Vec<uint32_t, 16>) {
  return bit_cast<Vec<uint32_t, 16>>(_mm512_maskz_cvtepu16_epi32(-1, bit_cast<__m256i>(v)));
}
MOE_INLINE Vec<uint16_t, 16> convert(Vec<uint32_t, 16> v, Vec<uint16_t, 16>) {
  return bit_cast<Vec<uint16_t, 16>>(_mm512_maskz_cvtepi32_epi16(-1, bit_cast<__m512i>(v)));
}
MOE_INLINE Vec<double, 8> convert(Vec<float, 8> v, Vec<double, 8>) {
  return bit_cast<Vec<double, 8>>(_mm512_maskz_cvtps_pd(-1, bit_cast<__m256>(v)));
}
MOE_INLINE Vec<float, 8> convert(Vec<double, 8> v, Vec<float, 8>) {
  return bit_cast<Vec<float, 8>>(_mm512_maskz_cvtpd_ps(-1, bit_cast<__m512d>(v)));
}
#endif
template <class To, class From>
MOE_INLINE To convert(From v, To) {
  return __builtin_convertvector(v, To);
}
template <class To, class From>
MOE_INLINE To convert(From v) {
  return convert(v, To{});
}

template <class C, class S>
MOE_INLINE Vec<C> to_compute(Packed<C, S> v) {
  constexpr int n = kLanes<C>;
  if constexpr (std::is_same_v<S, C>) {
    return v;
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    return convert<Vec<C>>(bit_cast<Vec<float, n>>(convert<Vec<uint32_t, n>>(v) << 16));
  } else if constexpr (std::is_same_v<S, float16>) {
#if defined(__AVX512F__)
    if constexpr (n == 16) return bit_cast<Vec<C>>(_mm512_maskz_cvtph_ps(-1, bit_cast<__m256i>(v)));
#elif defined(__F16C__)
    if constexpr (n == 8) return bit_cast<Vec<C>>(_mm256_cvtph_ps(bit_cast<__m128i>(v)));
#endif
    Vec<C> out;
    for (int i = 0; i < n; ++i) out[i] = C(__builtin_bit_cast(_Float16, uint16_t(v[i])));
    return out;
  } else {
    return convert<Vec<C>>(v);
  }
}

#ifdef __AVX512BF16__
MOE_INLINE bool any_denormal(Vec<float> v) {
  constexpr int kDenormal = 0x20;
  return _mm512_fpclass_ps_mask(bit_cast<__m512>(v), kDenormal) != 0;
}
#endif

// Whether from_compute rounds by an instruction that flushes: takes numbers below the smallest normal one for zeros.
template <class S, class C>
inline constexpr bool kRoundingFlushes =
#ifdef __AVX512BF16__
    std::is_same_v<S, bfloat16> && kLanes<C> == 16;
#else
    false;
#endif

// Rounds to nearest even, as PyTorch does; a NaN becomes a quiet NaN. may_flush: the caller looks for what is flushed.
template <class S, class C, bool may_flush = false>
MOE_INLINE Packed<C, S> from_compute(Vec<C> v) {
  constexpr int n = kLanes<C>;
  if constexpr (std::is_same_v<S, C>) {
    return v;
  } else if constexpr (std::is_same_v<S, bfloat16>) {
    auto f = convert<Vec<float, n>>(v);
#ifdef __AVX512BF16__
    if constexpr (kRoundingFlushes<S, C>)
      if (may_flush || __builtin_expect(!any_denormal(f), 1))
        return bit_cast<Packed<C, S>>(_mm512_cvtneps_pbh(bit_cast<__m512>(f)));
#endif
    auto bits = bit_cast<Vec<uint32_t, n>>(f);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = f == f ? bits : bits * 0 + 0x7fc0;
    return convert<Packed<C, S>>(bits);
  } else if constexpr (std::is_same_v<S, float16>) {
#if defined(__AVX512F__)
    if constexpr (n == 16)
      return bit_cast<Packed<C, S>>(_mm512_maskz_cvtps_ph(-1, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    if constexpr (n == 8)
      return bit_cast<Packed<C, S>>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#endif
    Packed<C, S> out;
    for (int i = 0; i < n; ++i) out[i] = __builtin_bit_cast(uint16_t, _Float16(v[i]));
    return out;
  } else {
    return convert<Packed<C, S>>(v);
  }
}

MOE_INLINE bool any_zero(Vec<uint16_t> v) {
#ifdef __AVX512BW__
  return _mm512_test_epi16_mask(bit_cast<__m512i>(v), bit_cast<__m512i>(v)) != 0xffffffff;
#else
  bool any = false;
  for (int i = 0; i < kLanes<uint16_t>; ++i) any |= v[i] == 0;
  return any;
#endif
}

// The first n values, none where n is negative; the other lanes are zero.
template <class C, class S>
MOE_INLINE Packed<C, S> load_packed(const S* from, int64_t n = kLanes<C>) {
  Packed<C, S> v{};
  if (n >= kLanes<C>) std::memcpy(&v, from, sizeof(v));
  else if (n > 0) std::memcpy(&v, from, n * sizeof(S));
  return v;
}

template <class C, class S>
MOE_INLINE Vec<C> load(const S* from, int64_t n = kLanes<C>) {
  return to_compute<C, S>(load_packed<C>(from, n));
}

template <class C, class S>
MOE_INLINE void store(S* to, Vec<C> value) {
  auto v = from_compute<S, C>(value);
  std::memcpy(to, &v, sizeof(v));
}

// The first n values.
template <class C, class S>
MOE_INLINE void store(S* to, Vec<C> value, int64_t n) {
  if (n >= kLanes<C>) return store<C>(to, value);
  auto v = from_compute<S, C>(value);
  std::memcpy(to, &v, n * sizeof(S));
}

// A whole vector, as it is.
template <class E>
MOE_INLINE Vec<E> load_vector(const void* from) {
  Vec<E> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class E>
MOE_INLINE void store_vector(E* to, Vec<E> value) {
  std::memcpy(to, &value, sizeof(value));
}

// One value at a time, with the same rounding.
template <class C, class S>
MOE_INLINE C to_scalar(S value) {
  if constexpr (std::is_same_v<S, bfloat16>) return C(__builtin_bit_cast(float, uint32_t(value.bits) << 16));
  else if constexpr (std::is_same_v<S, float16>) return C(__builtin_bit_cast(_Float16, value.bits));
  else return C(value);
}

// Reads element i of a Vector of any float dtype.
template <class C>
MOE_INLINE C read(const Vector& vector, int64_t i) {
  switch (vector.dtype) {
    case Dtype::float32: return to_scalar<C>(static_cast<const float*>(vector.data)[i]);
    case Dtype::bfloat16: return to_scalar<C>(static_cast<const bfloat16*>(vector.data)[i]);
    case Dtype::float16: return to_scalar<C>(static_cast<const float16*>(vector.data)[i]);
    default: return to_scalar<C>(static_cast<const double*>(vector.data)[i]);
  }
}

// Calls f with a null pointer whose type is the C++ type of a dtype.
template <class F>
MOE_INLINE decltype(auto) visit_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(nullptr));
    case Dtype::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case Dtype::float16: return f(static_cast<float16*>(nullptr));
    default: return f(static_cast<double*>(nullptr));
  }
}

MOE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
MOE_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Values that whole vectors of C take.
template <class C>
MOE_INLINE int64_t round_to_lanes(int64_t n) {
  return ceil_div(n, kLanes<C>) * kLanes<C>;
}

template <class C>
MOE_INLINE C sum_lanes(Vec<C> v) {
  for (int step = kLanes<C> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) v[i] += v[i + step];
  return v[0];
}

}  // namespace moe::MOE_ISA
