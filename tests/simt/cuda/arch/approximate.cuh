// The processor's approximations, on the emulator: as far from the exact result as the PTX ISA allows, to a side that
// the argument's bits decide. The hardware's own errors are smaller and elsewhere.
#pragma once

#include <cuda_runtime.h>

#include <bit>

namespace moe::arch {

inline float without_denormals(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// By so many units in the last place before it is rounded; powers of two stay.
inline float off_by(double ulps, double exact, float argument) {
  const float nearest = float(exact);
  if (!std::isfinite(nearest) || (std::bit_cast<uint32_t>(nearest) & 0x7fffff) == 0) return without_denormals(nearest);
  const bool up = std::bit_cast<uint32_t>(argument) * 0x9e3779b9u >> 31;
  const double ulp = std::ldexp(1.0, std::ilogb(nearest) - 23);
  return without_denormals(float(exact + (up ? ulps : -ulps) * ulp));
}

inline float approximate_exp2(float x) { return off_by(1.5, std::exp2(double(without_denormals(x))), x); }

inline float approximate_reciprocal(float x) { return off_by(0.5, 1 / double(without_denormals(x)), x); }

}  // namespace moe::arch
