// DropPolicy::probability: of an expert's slots, those with the highest weights stay; equal weights go by slot.
//
// A team, one warp or the block, finds the weight of the last slot that stays by radix select, 8 bits of the weight at
// a time, and how many of its equals stay. Then it walks the expert's slots once more, which lie in slot order.
#pragma once

#include "cuda/arch/warp.cuh"
#include "cuda/kernels/digits.cuh"
#include "cuda/kernels/plan_shared.cuh"
#include "stages/params.h"

namespace moe {

struct DropLeast {
  Vector weights;                 // [slots]
  int weight_bits;                // of one
  const int32_t* row_slot;        // [slots], sorted by expert without a limit
  const int32_t* offsets;         // [E + 1] of that sort
  int32_t num_experts, capacity;  // capacity > 0
  int32_t* kept;                  // [slots], the expert; becomes -1 where dropped

  // The weight of a slot as an integer in the same order: -0 equals 0, every NaN is the largest.
  __device__ uint64_t key(int32_t slot) const {
    uint64_t bits, infinity;
    switch (weights.dtype) {
      case Dtype::float32: bits = static_cast<const uint32_t*>(weights.data)[slot], infinity = 0x7f800000; break;
      case Dtype::bfloat16: bits = static_cast<const uint16_t*>(weights.data)[slot], infinity = 0x7f80; break;
      case Dtype::float16: bits = static_cast<const uint16_t*>(weights.data)[slot], infinity = 0x7c00; break;
      default: bits = static_cast<const uint64_t*>(weights.data)[slot], infinity = 0x7ff0000000000000;
    }
    const uint64_t sign = uint64_t(1) << (weight_bits - 1), magnitude = bits & (sign - 1);
    if (magnitude > infinity) return sign | (sign - 1);
    return bits & sign ? sign - magnitude : sign + magnitude;
  }
};

// Warps that work on one expert, each on a segment of its rows.
struct DropTeam {
  int first_warp, warps;

  __device__ int rank() const { return warp_id() - first_warp; }
  __device__ void sync() const { warps == 1 ? arch::sync_warp() : arch::sync_block(); }
};

// The keys of 32 * kPlanSteps rows, several in flight.
struct Keys {
  uint64_t value[kPlanSteps];
  int32_t slot[kPlanSteps];  // -1: none

  __device__ Keys(const DropLeast& drop, int64_t row, int64_t end) {
#pragma unroll
    for (int i = 0; i < kPlanSteps; ++i) {
      const int64_t at = row + 32 * i + arch::lane_id();
      slot[i] = at < end ? drop.row_slot[at] : -1;
    }
#pragma unroll
    for (int i = 0; i < kPlanSteps; ++i) value[i] = slot[i] >= 0 ? drop.key(slot[i]) : 0;
  }
};

// By one warp: the digit of the `left`-th highest key, and how many keys of this digit stay.
__device__ inline void find_threshold(PlanShared& shared, const DropTeam& team, int32_t left) {
  find_digit(
      left,
      [&](int digit) {
        int32_t count = 0;
        for (int warp = 0; warp < team.warps; ++warp) count += shared.counts[team.first_warp + warp][digit];
        return count;
      },
      [&](int digit, int32_t stay, int32_t) {
        shared.digit[team.first_warp] = digit, shared.left[team.first_warp] = stay;
      });
}

__device__ inline void drop_least(const DropLeast& drop, PlanShared& shared, const DropTeam& team, int32_t expert) {
  const int64_t all_begin = drop.offsets[expert], all_end = drop.offsets[expert + 1];
  if (all_end - all_begin <= drop.capacity) return;
  constexpr int64_t chunk = 32 * kPlanSteps;
  const int64_t segment = (all_end - all_begin + chunk * team.warps - 1) / (chunk * team.warps) * chunk;
  const int64_t begin = all_begin + team.rank() * segment, end = min(begin + segment, all_end);

  uint64_t threshold = 0;
  int32_t left = drop.capacity;
  for (int shift = drop.weight_bits - 8; shift >= 0; shift -= 8) {
    clear_counts(shared, 256);
    for (int64_t row = begin; row < end; row += chunk) {
      const Keys keys(drop, row, end);
      for (int i = 0; i < kPlanSteps; ++i) {
        const bool candidate = keys.slot[i] >= 0 && (keys.value[i] ^ threshold) >> shift >> 8 == 0;
        count_lanes(shared.counts[warp_id()], candidate ? int32_t(keys.value[i] >> shift & 255) : -1, 256);
      }
    }
    team.sync();  // all have counted
    if (team.rank() == 0) find_threshold(shared, team, left);
    team.sync();  // the digit is known, the counts are read
    threshold |= uint64_t(shared.digit[team.first_warp]) << shift;
    left = shared.left[team.first_warp];
  }

  int32_t equals = 0;
  for (int64_t row = begin; row < end; row += chunk) {
    const Keys keys(drop, row, end);
    for (int i = 0; i < kPlanSteps; ++i)
      equals += arch::count_bits(arch::ballot(keys.slot[i] >= 0 && keys.value[i] == threshold));
  }
  if (arch::lane_id() == 0) shared.sums[warp_id()] = equals;
  team.sync();  // the equals of all segments are known
  equals = 0;
  for (int warp = 0; warp < team.rank(); ++warp) equals += shared.sums[team.first_warp + warp];

  for (int64_t row = begin; row < end; row += chunk) {
    const Keys keys(drop, row, end);
    for (int i = 0; i < kPlanSteps; ++i) {
      const bool equal = keys.slot[i] >= 0 && keys.value[i] == threshold;
      const uint32_t mask = arch::ballot(equal);
      const bool stays = equal ? equals + arch::count_bits(mask & lanes_below()) < left : keys.value[i] > threshold;
      if (keys.slot[i] >= 0 && !stays) drop.kept[keys.slot[i]] = -1;
      equals += arch::count_bits(mask);
    }
  }
}

}  // namespace moe
