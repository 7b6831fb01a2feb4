// Where the rows of an operand lie, and what they are scaled by.
#pragma once

#include "cuda/kernels/math.cuh"
#include "stages/params.h"

namespace moe {

// A slot, kept within those there are whatever the plan says.
__device__ __forceinline__ int64_t slot_within(const GatheredRows& from, int64_t slot) {
  const int64_t last = from.num_rows * from.width - 1;
  return slot < 0 ? 0 : slot > last ? last : slot;
}

// The slot of a row; without a gather the row itself.
__device__ __forceinline__ int64_t slot_of(const GatheredRows& from, int64_t row) {
  return from.row_slot ? slot_within(from, from.row_slot[row]) : row;
}

template <class T>
__device__ __forceinline__ const T* row_at(const GatheredRows& from, int64_t slot) {
  const int64_t row = from.row_slot ? uint32_t(slot) / uint32_t(from.width) : slot;  // slots are below 2^31
  return static_cast<const T*>(from.rows.data) + row * from.rows.stride;
}

__device__ __forceinline__ float scale_at(const GatheredRows& from, int64_t slot) {
  return from.scale.data ? read(from.scale, slot) : 1;
}

}  // namespace moe
