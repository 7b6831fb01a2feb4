// plan: one launch for few slots, several for many; kernels/plan.cuh counts them.
#include "cuda/kernels/plan.cuh"

#include <algorithm>

#include "cuda/kernels/math.cuh"
#include "device.h"

namespace moe {
namespace {

// Tiles take whole chunks, and at least as many slots as there are experts, so that counts take no more room than ids.
int32_t tile_slots(int64_t slots, int64_t num_experts) {
  const int64_t tiles = std::clamp<int64_t>(slots / std::max<int64_t>(kPlanChunk, num_experts), 1, kPlanMaxTiles);
  const int64_t chunks = ceil_div(slots, tiles * kPlanChunk);
  return int32_t(std::min<int64_t>(chunks * kPlanChunk, std::max<int64_t>(slots, 1)));
}

PlanSteps steps_of(const PlanParams& p, const Device& device) {
  const int64_t slots = p.tokens * p.top_k;
  const CountingSort plain{
      .experts = p.experts,
      .experts_are_int64 = p.experts_are_int64,
      .slots = int32_t(slots),
      .num_experts = int32_t(p.num_experts),
      .capacity = int32_t(std::min(p.capacity, slots)),
      .tile_slots = tile_slots(slots, p.num_experts),
      .totals = p.counts,
  };
  PlanSteps steps{.first = plain, .last = plain};
  steps.last.offsets = p.offsets;
  steps.last.counts = p.counts;
  steps.last.row_slot = p.row_slot;
  steps.last.slot_row = p.slot_row;

  const bool limited = p.capacity > 0 && p.capacity < slots;
  steps.drops_least = limited && p.drop_policy == DropPolicy::probability;
  steps.sorts_twice = steps.drops_least || (limited && p.drop_policy == DropPolicy::choice_first && p.top_k > 1);
  if (!steps.sorts_twice) return steps;

  auto* kept = static_cast<int32_t*>(device.scratch(slots * int64_t(sizeof(int32_t))));
  steps.first.kept = kept;
  steps.last.experts = kept;
  steps.last.experts_are_int64 = false;
  if (steps.drops_least) {
    steps.first.capacity = int32_t(slots);
    steps.first.offsets = p.offsets;
    steps.first.row_slot = p.row_slot;
    steps.drop = {.weights = p.weights,
                  .weight_bits = int(8 * size_of(p.weights.dtype)),
                  .row_slot = p.row_slot,
                  .offsets = p.offsets,
                  .num_experts = int32_t(p.num_experts),
                  .capacity = int32_t(p.capacity),
                  .kept = kept};
  } else {
    steps.first.step = int32_t(p.top_k);
  }
  return steps;
}

void run(const CountingSort& sort, const Device& device) {
  const int64_t tiles = ceil_div(sort.slots, sort.tile_slots);
  const Launch per_tile{.grid = unsigned(tiles),
                        .block = kPlanThreads,
                        .shared_bytes = sizeof(PlanShared),
                        .stream = device.stream(),
                        .early = device.starts_early()};
  launch(per_tile, plan_count_kernel, sort);
  launch({.grid = unsigned(ceil_div(sort.num_experts, 32)),
          .block = kPlanScanWarps * 32,
          .shared_bytes = sizeof(PlanScanShared),
          .stream = device.stream(),
          .early = device.starts_early()},
         plan_scan_kernel, sort, int(tiles));
  launch(per_tile, plan_place_kernel, sort);
}

}  // namespace

void plan(const PlanParams& p, const Device& device) {
  PlanSteps steps = steps_of(p, device);
  const int64_t slots = steps.last.slots;
  if (slots <= kPlanOneBlockSlots) {
    launch({.grid = 1,
            .block = kPlanThreads,
            .shared_bytes = sizeof(PlanShared),
            .stream = device.stream(),
            .early = device.starts_early()},
           plan_one_block_kernel, steps);
    return;
  }
  const int64_t tiles = ceil_div(slots, steps.last.tile_slots);
  auto* counts = static_cast<int32_t*>(device.scratch((tiles + 1) * p.num_experts * int64_t(sizeof(int32_t))));
  for (CountingSort* sort : {&steps.first, &steps.last}) {
    sort->totals = counts;
    sort->tile_counts = counts + p.num_experts;
  }
  if (steps.sorts_twice) run(steps.first, device);
  if (steps.drops_least)
    launch({.grid = unsigned(p.num_experts),
            .block = kPlanThreads,
            .shared_bytes = sizeof(PlanShared),
            .stream = device.stream(),
            .early = device.starts_early()},
           plan_drop_kernel, steps.drop);
  run(steps.last, device);
}

}  // namespace moe
