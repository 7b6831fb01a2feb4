// Neighbouring values of a row, of which the last ones may lie behind its end.
#pragma once

#include "cuda/arch/memory.cuh"
#include "cuda/kernels/math.cuh"

namespace moe {

// Values [n] from `from` on, of which the first `left` are there and the others `rest`. aligned: from is, to the size
// of n values.
template <class T, int n>
MOE_INLINE arch::Pack<T, n> load_values(const T* from, int64_t left, bool aligned, float rest = 0) {
  if (aligned && left >= n) return arch::load<arch::Pack<T, n>>(from);
  arch::Pack<T, n> out;
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = i < left ? from[i] : from_float<T>(rest);
  return out;
}

// The first `left` of them to `to`.
template <class T, int n>
MOE_INLINE void store_values(T* to, const arch::Pack<T, n>& values, int64_t left, bool aligned) {
  if (aligned && left >= n) return arch::store(to, values);
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < left) to[i] = values[i];
}

}  // namespace moe
