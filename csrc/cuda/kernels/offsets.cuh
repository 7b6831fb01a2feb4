// The rows of an expert, as every device reads offsets: from 0, within 0..num_rows, never falling.
#pragma once

#include <cstdint>

#include "cuda/arch/warp.cuh"

namespace moe {

struct RowRange {
  int64_t begin, end;
};

// Where an expert ends by its own offset. No expert ends before one of smaller number does.
__device__ __forceinline__ int32_t own_end(const int32_t* offsets, int64_t expert, int64_t num_rows) {
  return int32_t(max(min(int64_t(offsets[expert + 1]), num_rows), int64_t(0)));
}

// By the lanes of a warp together.
__device__ __forceinline__ RowRange rows_of_expert(const int32_t* offsets, int64_t expert, int64_t num_rows) {
  int32_t begin = 0;
  for (int64_t e = arch::lane_id(); e < expert; e += 32) begin = max(begin, own_end(offsets, e, num_rows));
  for (int distance = 16; distance > 0; distance /= 2) begin = max(begin, arch::shuffle_xor(begin, distance));
  return {begin, max(begin, own_end(offsets, expert, num_rows))};
}

}  // namespace moe
