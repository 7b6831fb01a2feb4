// What the activation computes with in kernels: accurate functions, or, where 16 bits are kept, the processor's own.
#pragma once

#include <type_traits>

#include "cuda/arch/approximate.cuh"
#include "cuda/kernels/math.cuh"
#include "stages/activation.h"

namespace moe {

// For what is rounded to float32.
struct FloatMath {
  using V = float;
  static MOE_INLINE float constant(double value) { return float(value); }
  static constexpr bool has_tanh = true;
  static MOE_INLINE float tanh(float x) { return tanhf(x); }
  static MOE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  static MOE_INLINE Normal<FloatMath> normal(float x) {
    return {0.5f * (1.0f + erff(x * 0.70710678f)), 0.39894228f * expf(-0.5f * x * x)};
  }
  static MOE_INLINE float select(bool mask, float a, float b) { return mask ? a : b; }
};

// For what is rounded to 16 bits: branch-free, relative errors below 2^-16, the lower tails' too.
struct ApproximateMath : FloatMath {
  static constexpr bool has_tanh = false;

  // Both sides of the fraction times 2^-32, so that no reciprocal is as small as to count as zero.
  static MOE_INLINE float sigmoid(float x) {
    return 0x1p-32f * arch::approximate_reciprocal(0x1p-32f + arch::approximate_exp2(fmaf(x, -1.44269504f, -32.0f)));
  }

  // Of the smaller tail, exp(-x^2 / 2) times a polynomial of 1 / (1 + 0.308 |x|) whose relative error is 4e-6, the
  // least that six coefficients reach up to 14: the form of Abramowitz & Stegun 7.1.26.
  static MOE_INLINE Normal<ApproximateMath> normal(float x) {
    const float t = arch::approximate_reciprocal(fmaf(0.308f, fabsf(x), 1.0f));
    float p = fmaf(-0.0754299536f, t, 0.189617887f);
    p = fmaf(p, t, 0.00727305375f);
    p = fmaf(p, t, 0.136533529f);
    p = fmaf(p, t, 0.118881233f);
    p = fmaf(p, t, 0.12312270f);
    const float bell = arch::approximate_exp2(-0.72134752f * x * x), tail = bell * (p * t);
    return {x > 0 ? 1.0f - tail : tail, 0.39894228f * bell};
  }
};

// For results that are rounded to T.
template <class T>
using MathFor = std::conditional_t<sizeof(T) == 2, ApproximateMath, FloatMath>;

}  // namespace moe
