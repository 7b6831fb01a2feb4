// What the kernels of plan share: the sizes of a block's work, its memory, and counting by warp.
#pragma once

#include "cuda/kernels/warp.cuh"

namespace moe {

inline constexpr int kPlanThreads = 256, kPlanWarps = kPlanThreads / 32;
inline constexpr int kPlanSteps = 8;  // slots of a thread in one chunk
inline constexpr int kPlanChunk = kPlanThreads * kPlanSteps;
inline constexpr int kPlanPerThread = 4;                           // experts of a thread
inline constexpr int kPlanWindow = kPlanThreads * kPlanPerThread;  // experts whose counts shared memory holds

struct PlanShared {
  int32_t counts[kPlanWarps][kPlanWindow];  // of this warp; once scanned, the rank at which it goes on
  int32_t before[kPlanWindow];              // slots of the expert before the chunk
  int32_t offset[kPlanWindow];              // the expert's first row
  int32_t sums[kPlanWarps];
  int32_t digit[kPlanWarps], left[kPlanWarps];  // what the first warp of a team has found
};

__device__ __forceinline__ uint32_t lanes_below() { return (1u << arch::lane_id()) - 1; }

// Adds the lanes to counts[bucket], those with a bucket outside 0..width-1 to none; gives each lane those that have its
// bucket. One of them writes, so that no atomics are needed.
__device__ __forceinline__ uint32_t count_lanes(int32_t* counts, int32_t bucket, int32_t width) {
  const bool inside = bucket >= 0 && bucket < width;
  const uint32_t peers = arch::match(inside ? bucket : -1);
  if (inside && arch::lane_id() == arch::lowest_bit(peers)) counts[bucket] += arch::count_bits(peers);
  arch::sync_warp();
  return peers;
}

// Those of this warp.
__device__ __forceinline__ void clear_counts(PlanShared& shared, int32_t width) {
  for (int32_t i = arch::lane_id(); i < width; i += 32) shared.counts[warp_id()][i] = 0;
  arch::sync_warp();
}

struct Scanned {
  int32_t before, all;
};

// The sum of the values of the threads before, and of all.
__device__ inline Scanned scan_block(PlanShared& shared, int32_t value) {
  const int32_t through = scan_warp(value);
  arch::sync_block();  // the sums of the last scan are read
  if (arch::lane_id() == 31) shared.sums[warp_id()] = through;
  arch::sync_block();  // those of this one are written
  Scanned out{through - value, 0};
  for (int warp = 0; warp < kPlanWarps; ++warp) {
    if (warp < warp_id()) out.before += shared.sums[warp];
    out.all += shared.sums[warp];
  }
  return out;
}

}  // namespace moe
