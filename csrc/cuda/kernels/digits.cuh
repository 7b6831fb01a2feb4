// A step of a radix select from the top: digits of eight bits are counted, and one of them is found.
#pragma once

#include "cuda/kernels/warp.cuh"

namespace moe {

// found(digit, left, count): where the wanted-th key from the top lies, which of the keys with this digit it is, and
// how many have it. By the lanes of a warp together, one of which calls it; count(digit) is asked once for each.
template <class Count, class Found>
__device__ __forceinline__ void find_digit(int32_t wanted, const Count& count, const Found& found) {
  constexpr int kMine = 8;  // digits of a lane, the highest first
  const int top = 255 - kMine * arch::lane_id();
  int32_t counts[kMine], sum = 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) sum += counts[i] = count(top - i);
  int32_t above = scan_warp(sum) - sum;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (above < wanted && wanted <= above + counts[i]) found(top - i, wanted - above, counts[i]);
    above += counts[i];
  }
}

}  // namespace moe
