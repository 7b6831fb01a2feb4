// A ring of stages in shared memory between the warps that fill them and those that use them. Both sides walk it alike.
#pragma once

#include "cuda/kernels/math.cuh"

namespace moe {

// The stages one after another, and the parity of their barriers in this round.
template <int stages>
struct StageRing {
  int stage = 0;
  uint32_t parity = 0;

  MOE_INLINE void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }

  // Past what others use.
  MOE_INLINE void skip(int count) {
    const int sum = stage + count;
    stage = sum % stages, parity ^= sum / stages % 2;
  }
};

}  // namespace moe
