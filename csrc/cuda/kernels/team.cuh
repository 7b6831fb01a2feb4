// The threads that work on one token together: a few lanes of a warp, or a block.
#pragma once

#include "cuda/kernels/warp.cuh"

namespace moe {

// `size` lanes side by side, a power of two. All lanes of the warp make each call together, those without a token too.
struct LaneTeam {
  int size, rank;

  __device__ explicit LaneTeam(int size) : size(size), rank(arch::lane_id() & (size - 1)) {}

  // In float64, so that its error does not grow with the number of terms; the same in every lane.
  __device__ double sum(double value) const {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      if (distance < size) value += arch::shuffle_xor(value, distance);
    return value;
  }

  __device__ int32_t max(int32_t value) const {
    if (size == 32) return arch::reduce_max(value);
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
      if (distance < size) {
        const int32_t other = arch::shuffle_xor(value, distance);
        value = other > value ? other : value;
      }
    return value;
  }

  __device__ void sync() const { arch::sync_warp(); }
};

struct BlockTeamShared {
  double sums[32];
  int32_t largest[32];
};

struct BlockTeam {
  int size, rank;
  BlockTeamShared& shared;

  __device__ explicit BlockTeam(BlockTeamShared& shared)
      : size(int(blockDim.x)), rank(int(threadIdx.x)), shared(shared) {}

  __device__ double sum(double value) const {
    value = sum_of_warp(value);
    if (rank % 32 == 0) shared.sums[rank / 32] = value;
    sync();  // the warps' sums are written
    double total = 0;
    for (int warp = 0; warp < size / 32; ++warp) total += shared.sums[warp];
    sync();  // and read, before the next call writes
    return total;
  }

  __device__ int32_t max(int32_t value) const {
    value = arch::reduce_max(value);
    if (rank % 32 == 0) shared.largest[rank / 32] = value;
    sync();
    for (int warp = 0; warp < size / 32; ++warp) value = shared.largest[warp] > value ? shared.largest[warp] : value;
    sync();
    return value;
  }

  __device__ void sync() const { arch::sync_block(); }
};

}  // namespace moe
