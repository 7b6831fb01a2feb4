// Rows of a plan that no token has: those of dropped slots.
#pragma once

#include "cuda/arch/warp.cuh"

namespace moe {

// Bit i tells whether row first + i is one: its slot is not one of 0..slots-1, or has another row.
__device__ __forceinline__ uint32_t dropped_rows(const int32_t* row_slot, const int32_t* slot_row, int64_t slots,
                                                 int64_t rows, int64_t first) {
  const int64_t row = first + arch::lane_id();
  bool dropped = false;
  if (row < rows) {
    const int64_t slot = row_slot[row];
    dropped = slot < 0 || slot >= slots || slot_row[slot] != row;
  }
  return arch::ballot(dropped);
}

}  // namespace moe
