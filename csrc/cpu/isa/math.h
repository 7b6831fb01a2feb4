// Elementary functions on vectors: exp, log1p, softplus, sigmoid, tanh, erf.
// float: range reduction and a minimax polynomial, within about 2 units in the last place (erf's result near 1:
// absolute); no branches, so lanes with NaN or infinities cost nothing. double: exp likewise, the others by the C
// library, lane by lane.
#pragma once

#include <limits>

#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

template <class C>
MOE_INLINE Vec<C> abs(Vec<C> x) {
  return bit_cast<Vec<C>>(bit_cast<Vec<Bits<C>>>(x) & std::numeric_limits<Bits<C>>::max());
}

template <class C>
MOE_INLINE Vec<C> minus_abs(Vec<C> x) {
  return bit_cast<Vec<C>>(bit_cast<Vec<Bits<C>>>(x) | std::numeric_limits<Bits<C>>::min());
}

// |magnitude| with the sign of sign.
template <class C>
MOE_INLINE Vec<C> copy_sign(Vec<C> magnitude, Vec<C> sign) {
  auto sign_bit = bit_cast<Vec<Bits<C>>>(sign) & std::numeric_limits<Bits<C>>::min();
  return bit_cast<Vec<C>>(bit_cast<Vec<Bits<C>>>(abs<C>(magnitude)) | sign_bit);
}

// coefficients[0] + coefficients[1] x + ...
template <class C, class... Rest>
MOE_INLINE Vec<C> polynomial(Vec<C> x, C first, Rest... rest) {
  if constexpr (sizeof...(rest) == 0) return broadcast(first);
  else return polynomial<C>(x, rest...) * x + first;
}

MOE_INLINE Vec<double> each_lane(Vec<double> x, double (*f)(double)) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

// x * 2^n for whole n, rounded once; |n| at most twice the largest exponent of a C.
template <class C>
MOE_INLINE Vec<C> times_power_of_two(Vec<C> x, Vec<C> n) {
#ifdef __AVX512F__
  if constexpr (sizeof(C) == 4)
    return bit_cast<Vec<C>>(_mm512_maskz_scalef_ps(-1, bit_cast<__m512>(x), bit_cast<__m512>(n)));
  else return bit_cast<Vec<C>>(_mm512_maskz_scalef_pd(-1, bit_cast<__m512d>(x), bit_cast<__m512d>(n)));
#else
  // In two steps, so that both factors and the first product are normal numbers.
  constexpr int kMantissa = sizeof(C) == 4 ? 23 : 52, kBias = sizeof(C) == 4 ? 127 : 1023;
  const Vec<Bits<C>> exponent = __builtin_convertvector(n, Vec<Bits<C>>), half = exponent >> 1;
  return x * bit_cast<Vec<C>>((half + kBias) << kMantissa) * bit_cast<Vec<C>>((exponent - half + kBias) << kMantissa);
#endif
}

template <class C>
MOE_INLINE Vec<C> square_root(Vec<C> x) {
  for (int i = 0; i < kLanes<C>; ++i) x[i] = sizeof(C) == 4 ? C(__builtin_sqrtf(x[i])) : C(__builtin_sqrt(x[i]));
  return x;
}

template <class C>
MOE_INLINE Vec<C> exp(Vec<C> x) {
  constexpr bool single = sizeof(C) == 4;
  constexpr C kToNearest = single ? C(0x1.8p23) : C(0x1.8p52);  // adding it rounds to an integer
  constexpr C kHigh = single ? C(0x1.63p-1) : C(0x1.62e42feep-1);
  constexpr C kLow = single ? C(-0x1.bd0106p-13) : C(0x1.a39ef35793c76p-33);
  // Outside of these the result is 0 or inf; NaN passes through both.
  const Vec<C> lowest = broadcast(single ? C(-104) : C(-746)), highest = broadcast(single ? C(89) : C(710));
  x = smaller<C>(highest, larger<C>(lowest, x));
  Vec<C> shifted = x * C(0x1.71547652b82fep0) + kToNearest;
  Vec<C> n = shifted - kToNearest;
  Vec<C> r = x - n * kHigh;  // ln 2 in two pieces, the first short enough for an exact product
  r = r - n * kLow;
  Vec<C> p;
  if constexpr (single)
    p = polynomial<C>(r, 4.999999404e-01f, 1.666651964e-01f, 4.166840762e-02f, 8.368921466e-03f, 1.381417038e-03f);
  else
    p = polynomial<C>(r, 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800,
                      1. / 39916800, 1. / 479001600, 1. / 6227020800);
  p = p * (r * r) + r + C(1);
  return times_power_of_two<C>(p, n);
}

template <class C>
MOE_INLINE Vec<C> log1p(Vec<C> x) {
  if constexpr (std::is_same_v<C, double>) {
    return each_lane(x, [](double v) { return __builtin_log1p(v); });
  } else {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    // 1 + x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2); f is made from x itself, which 1 + x may have rounded away.
    Vec<float> w = 1.0f + x;
    auto bits = bit_cast<Vec<uint32_t>>(w);
    auto n = bit_cast<Vec<int32_t>>(bits - 0x3f3504f3u) >> 23;
    auto n_shifted = bit_cast<Vec<uint32_t>>(n) << 23;
    Vec<float> inverse = bit_cast<Vec<float>>(0x3f800000u - n_shifted);
    Vec<float> scaled = x * inverse + (inverse - 1.0f);
    Vec<float> of_large = bit_cast<Vec<float>>(bits - n_shifted) - 1.0f;  // where 2^-n may be too small a number
    Vec<float> f = n > 30 ? of_large : scaled;
    Vec<float> p =
        polynomial<float>(f, 3.333331347e-01f, -2.500000894e-01f, 2.000214905e-01f, -1.666801721e-01f, 1.421889663e-01f,
                          -1.240468696e-01f, 1.189248711e-01f, -1.168362349e-01f, 6.746517867e-02f);
    Vec<float> square = f * f;
    Vec<float> k = __builtin_convertvector(n, Vec<float>);
    Vec<float> tail = p * f * square - 0.5f * square - k * 0x1.bd0106p-13f;
    Vec<float> y = f + tail + k * 0x1.63p-1f;
    y = w > 0.0f && w < kInfinity ? y : x + x;  // inf and NaN
    y = w == 0.0f ? broadcast(-kInfinity) : y;
    return w < 0.0f ? broadcast(std::numeric_limits<float>::quiet_NaN()) : y;
  }
}

// log(1 + e^x), relative accuracy in both tails.
template <class C>
MOE_INLINE Vec<C> softplus(Vec<C> x) {
  return larger<C>(broadcast(C(0)), x) + log1p<C>(exp<C>(minus_abs<C>(x)));
}

// 1 / (1 + e^-x); e^-|x| keeps the lower tail's denormal results.
template <class C>
MOE_INLINE Vec<C> sigmoid(Vec<C> x) {
  Vec<C> e = exp<C>(minus_abs<C>(x));
  return (x < C(0) ? e : broadcast(C(1))) / (C(1) + e);
}

template <class C>
MOE_INLINE Vec<C> tanh(Vec<C> x) {
  if constexpr (std::is_same_v<C, double>) {
    return each_lane(x, [](double v) { return __builtin_tanh(v); });
  } else {
    Vec<float> s = x * x;
    Vec<float> p = polynomial<float>(s, -3.333328068e-01f, 1.333143562e-01f, -5.373914167e-02f, 2.063712850e-02f,
                                     -5.702707451e-03f);
    Vec<float> near = p * s * x + x;
    Vec<float> size = abs<float>(x);
    Vec<float> far = 1.0f - 2.0f / (exp<float>(size + size) + 1.0f);
    return copy_sign<float>(size < 0.625f ? near : far, x);
  }
}

template <class C>
MOE_INLINE Vec<C> erf(Vec<C> x) {
  if constexpr (std::is_same_v<C, double>) {
    return each_lane(x, [](double v) { return __builtin_erf(v); });
  } else {
    Vec<float> s = x * x;
    Vec<float> p = polynomial<float>(s, 1.283791512e-01f, -3.761248589e-01f, 1.128171161e-01f, -2.676247992e-02f,
                                     4.986810498e-03f, -5.957368994e-04f);
    Vec<float> near = p * x + x;
    Vec<float> t = abs<float>(x);
    t = smaller<float>(broadcast(4.0f), t);  // where erf rounds to 1
    Vec<float> q = polynomial<float>(t, -1.286484897e-01f, -6.351513267e-01f, -1.062368900e-01f, 2.376207151e-02f,
                                     -3.642462892e-03f, 3.228048154e-04f, -1.123140009e-05f);
    Vec<float> far = copy_sign<float>(1.0f - exp<float>(q * t - t), x);
    return abs<float>(x) > 0.93f ? far : near;
  }
}

}  // namespace moe::MOE_ISA
