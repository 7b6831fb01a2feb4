// Exact selection of the k largest keys of a row of any length, ties to the lowest index, by a block.
#pragma once

#include "cuda/arch/atomic.cuh"
#include "cuda/kernels/digits.cuh"
#include "cuda/kernels/rank.cuh"

namespace moe {

struct SelectShared {
  int32_t histogram[256];
  int32_t digit, wanted, length;
  bool exact;
};

// Keys and indices as one number, all different: a larger key first, then a lower index.
__device__ __forceinline__ uint64_t order_of(int32_t key, int64_t index) {
  return uint64_t(uint32_t(key) ^ 0x80000000u) << 32 | uint32_t(~uint32_t(index));
}
__device__ __forceinline__ int32_t index_of(uint64_t order) { return int32_t(~uint32_t(order)); }

inline constexpr uint64_t kNone = ~uint64_t(0);  // above every order

// The smallest number that at least k orders of keys [count] reach, and no more; 1 <= k <= count. Digits of eight bits
// from the top down, until all that begins so is wanted.
__device__ inline uint64_t select(SelectShared& shared, const int32_t* keys, int64_t count, int32_t k) {
  uint64_t prefix = 0;
  for (int shift = 56;; shift -= 8) {
    for (int bin = int(threadIdx.x); bin < 256; bin += int(blockDim.x)) shared.histogram[bin] = 0;
    arch::sync_block();  // the histogram is empty, and all have read the digit before
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
      const uint64_t order = order_of(keys[i], i);
      if (shift == 56 || order >> (shift + 8) == prefix) arch::add(&shared.histogram[order >> shift & 255], 1);
    }
    arch::sync_block();  // and full
    if (threadIdx.x < 32)
      find_digit(
          k, [&](int bin) { return shared.histogram[bin]; },
          [&](int bin, int32_t left, int32_t count) {
            shared.digit = bin, shared.wanted = left, shared.exact = left == count;
          });
    arch::sync_block();  // the digit is found
    prefix = prefix << 8 | uint64_t(shared.digit);
    k = shared.wanted;
    if (shared.exact) return prefix << shift;
  }
}

// orders [length, a power of two], the largest first: a bitonic network.
__device__ inline void sort_orders(uint64_t* orders, int64_t length) {
  for (int64_t run = 2; run <= length; run *= 2)
    for (int64_t distance = run / 2; distance > 0; distance /= 2) {
      arch::sync_block();  // the step before is done
      for (int64_t i = threadIdx.x; i < length / 2; i += blockDim.x) {
        const int64_t low = 2 * i - (i & (distance - 1)), high = low + distance;
        const uint64_t a = orders[low], b = orders[high];
        const bool descending = (low & run) == 0;
        if ((a < b) == descending) orders[low] = b, orders[high] = a;
      }
    }
  arch::sync_block();
}

}  // namespace moe
