// The activation between the two GEMMs and its derivative, shared by all devices. M is what a device computes with:
// M::V a value or a vector of values, and constant, sigmoid, normal, select(mask, a, b) and, where has_tanh says so,
// tanh on it; MOE_INLINE marks its functions.
#pragma once

#include "stages/params.h"

namespace moe {

// Of the standard normal distribution.
template <class M>
struct Normal {
  typename M::V cdf, density;
};

template <class M>
struct ActivationMath {
  using V = typename M::V;

  struct Slope {
    V value, derivative;
  };

  // f(z), and f'(z) where asked for.
  template <bool derivative>
  static MOE_INLINE Slope act(const Activation& activation, V z) {
    const V one = M::constant(1);
    switch (activation.act) {
      case Act::silu: {
        const V alpha = M::constant(activation.alpha);
        const V sigma = M::sigmoid(alpha * z);
        const V value = z * sigma;
        if constexpr (!derivative) return {value, value};
        return {value, sigma + alpha * (value * (one - sigma))};
      }
      case Act::gelu: {
        const Normal<M> normal = M::normal(z);
        if constexpr (!derivative) return {z * normal.cdf, normal.cdf};
        return {z * normal.cdf, normal.cdf + z * normal.density};
      }
      case Act::gelu_tanh: {  // Hendrycks & Gimpel 2016: 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
        if constexpr (M::has_tanh) {
          const V half = M::constant(0.5), root = M::constant(0.79788456080286535588), cubic = M::constant(0.044715);
          const V square = z * z, t = M::tanh(root * z * (one + cubic * square)), cdf = half * (one + t);
          if constexpr (!derivative) return {z * cdf, cdf};
          return {z * cdf, cdf + half * z * (one - t * t) * root * (one + M::constant(3) * cubic * square)};
        } else {
          constexpr double root = 0.79788456080286535588, cubic = 0.044715 * root;
          const V linear = M::constant(2 * root), square = z * z;
          const V cdf = M::sigmoid(z * (M::constant(2 * cubic) * square + linear));  // as 1 + tanh(x) is 2 sigmoid(2 x)
          const V value = z * cdf;
          if constexpr (!derivative) return {value, value};
          return {value, cdf + value * (one - cdf) * (M::constant(6 * cubic) * square + linear)};
        }
      }
      case Act::relu: {
        const V zero = M::constant(0);
        return {M::select(z <= zero, zero, z), M::select(z <= zero, zero, one)};
      }
      case Act::relu2: {  // relu(z)^2
        const V zero = M::constant(0), r = M::select(z <= zero, zero, z);
        return {r * r, r + r};
      }
    }
    __builtin_unreachable();
  }

  static MOE_INLINE V limited_gate(const Activation& activation, V gate) {
    const V limit = M::constant(activation.limit);
    return M::select(gate > limit, limit, gate);
  }

  static MOE_INLINE V factor(const Activation& activation, V up) {
    const V limit = M::constant(activation.limit);
    return M::select(up > limit, limit, M::select(up < -limit, -limit, up)) + M::constant(activation.up_offset);
  }

  // act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset); up is ignored when plain.
  static MOE_INLINE V forward(const Activation& activation, V gate, V up) {
    const V value = act<false>(activation, limited_gate(activation, gate)).value;
    return activation.gated ? value * factor(activation, up) : value;
  }

  struct Gradient {
    V value, gate, up;
  };

  // The value, and its derivatives by gate and by up times `grad`. Where a derivative is 0 because its argument is cut
  // off, the product is not taken: 0 * inf is NaN.
  static MOE_INLINE Gradient backward(const Activation& activation, V gate, V up, V grad) {
    const V limit = M::constant(activation.limit), zero = M::constant(0);
    const Slope slope = act<true>(activation, limited_gate(activation, gate));
    const bool rectified = activation.act == Act::relu || activation.act == Act::relu2;
    auto alive = [&](V grad_gate) {
      if (rectified) grad_gate = M::select(gate <= zero, zero, grad_gate);
      return M::select(gate > limit, zero, grad_gate);
    };
    if (!activation.gated) return {slope.value, alive(grad * slope.derivative), zero};
    const V by = factor(activation, up), grad_up = grad * slope.value;
    return {slope.value * by, alive(grad * slope.derivative * by),
            M::select(up > limit, zero, M::select(up < -limit, zero, grad_up))};
  }
};

}  // namespace moe
