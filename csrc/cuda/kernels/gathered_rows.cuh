// Where the rows of an operand lie, and which of them an expert has.
#pragma once

#include "cuda/arch/warp.cuh"
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

// Values [n] from `from` on, of which the first `left` are there and the others zeros. aligned: from is, to the size of
// n values.
template <class T, int n>
__device__ __forceinline__ arch::Pack<T, n> load_values(const T* from, int64_t left, bool aligned) {
  if (aligned && left >= n) return arch::load<arch::Pack<T, n>>(from);
  arch::Pack<T, n> out;
#pragma unroll
  for (int i = 0; i < n; ++i) out[i] = i < left ? from[i] : from_float<T>(0);
  return out;
}

struct RowRange {
  int64_t begin, end;
};

// An expert's rows, by the lanes of a warp together: offsets as every device reads them, from 0, within 0..num_rows,
// never falling.
__device__ __forceinline__ RowRange rows_of_expert(const int32_t* offsets, int64_t expert, int64_t num_rows) {
  int64_t begin = 0;
  for (int64_t e = 1 + arch::lane_id(); e <= expert; e += 32) begin = max(begin, int64_t(offsets[e]));
  for (int distance = 16; distance > 0; distance /= 2) begin = max(begin, arch::shuffle_xor(begin, distance));
  begin = min(begin, num_rows);
  return {begin, max(begin, min(int64_t(offsets[expert + 1]), num_rows))};
}

}  // namespace moe
