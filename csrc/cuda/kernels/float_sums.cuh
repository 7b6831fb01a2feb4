// What a thread has summed up of a product in float32, [8, 8].
#pragma once

#include "cuda/kernels/math.cuh"

namespace moe {

// A float32 sum of many terms loses bits: every steps_of_part steps are summed apart.
template <int steps_of_part>
struct FloatSums {
  float part[8][8] = {}, sums[8][8] = {};
  int steps = 0;

  MOE_INLINE void end_step() {
    if (++steps % steps_of_part == 0) add_part();
  }

  MOE_INLINE void add_part() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[i][j] += part[i][j], part[i][j] = 0;
  }
};

}  // namespace moe
