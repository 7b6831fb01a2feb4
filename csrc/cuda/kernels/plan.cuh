// plan: which row each slot takes. A counting sort; a limit that is not by position first finds the slots that stay, in
// a sort of its own.
//
//   slots            drop policy           launches
//   up to 4096       any                   1: one block does all that follows
//   more             none, or position     3: count, scan, place
//                    choice_first          6: sorted by choice to find the slots that stay, then as above
//                    probability           7: sorted without a limit, drop_least, then as above
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/counting_sort.cuh"
#include "cuda/kernels/drop_least.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int64_t kPlanOneBlockSlots = 4096;
inline constexpr int kPlanMaxTiles = 512;
inline constexpr int kPlanScanWarps = 32;

// All that plan does; the first sort where the policy needs one, drop_least where it is by weight.
struct PlanSteps {
  CountingSort first, last;
  DropLeast drop;
  bool sorts_twice = false, drops_least = false;
};

__global__ void __launch_bounds__(kPlanThreads, 1) plan_one_block_kernel(const __grid_constant__ PlanSteps steps) {
  take_turn();
  auto& shared = arch::shared<PlanShared>();
  for (int pass = steps.sorts_twice ? 0 : 1; pass < 2; ++pass) {
    const CountingSort& sort = pass == 0 ? steps.first : steps.last;
    count_tile(sort, shared, 0, sort.slots, sort.totals);
    place_tile(sort, shared, 0, 0, sort.slots);
    arch::sync_block();  // what the first sort has written may be read by the block
    if (pass == 1 || !steps.drops_least) continue;
    const DropTeam team{.first_warp = warp_id(), .warps = 1};
    for (int64_t e = warp_id(); e < steps.drop.num_experts; e += kPlanWarps)
      drop_least(steps.drop, shared, team, int32_t(e));
    arch::sync_block();  // the slots that stay are known
  }
}

__global__ void __launch_bounds__(kPlanThreads) plan_count_kernel(const __grid_constant__ CountingSort sort) {
  take_turn();
  const int64_t tile = blockIdx.x, begin = tile * sort.tile_slots;
  count_tile(sort, arch::shared<PlanShared>(), begin, min(begin + sort.tile_slots, int64_t(sort.slots)),
             sort.tile_counts + tile * sort.num_experts);
}

__global__ void __launch_bounds__(kPlanThreads) plan_place_kernel(const __grid_constant__ CountingSort sort) {
  take_turn();
  const int64_t tile = blockIdx.x, begin = tile * sort.tile_slots;
  place_tile(sort, arch::shared<PlanShared>(), tile, begin, min(begin + sort.tile_slots, int64_t(sort.slots)));
}

// A block takes one expert.
__global__ void __launch_bounds__(kPlanThreads) plan_drop_kernel(const __grid_constant__ DropLeast drop) {
  take_turn();
  drop_least(drop, arch::shared<PlanShared>(), {.first_warp = 0, .warps = kPlanWarps}, int32_t(blockIdx.x));
}

struct PlanScanShared {
  int32_t sums[kPlanScanWarps][32];
};

// A block takes 32 experts, a warp of it some consecutive tiles, whose counts it keeps in registers.
__global__ void __launch_bounds__(kPlanScanWarps * 32)
    plan_scan_kernel(const __grid_constant__ CountingSort sort, int tiles) {
  take_turn();
  constexpr int mine = kPlanMaxTiles / kPlanScanWarps;
  auto& shared = arch::shared<PlanScanShared>();
  const int lane = arch::lane_id(), warp = int(threadIdx.x / 32);
  const int64_t expert = int64_t(blockIdx.x) * 32 + lane;
  auto at = [&](int i) { return (int64_t(warp) * mine + i) * sort.num_experts + expert; };
  auto exists = [&](int i) { return warp * mine + i < tiles && expert < sort.num_experts; };

  int32_t counts[mine], sum = 0;
#pragma unroll
  for (int i = 0; i < mine; ++i) counts[i] = exists(i) ? sort.tile_counts[at(i)] : 0;
#pragma unroll
  for (int i = 0; i < mine; ++i) sum += counts[i];
  shared.sums[warp][lane] = sum;
  arch::sync_block();  // the sums of all warps are written
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) before += shared.sums[w][lane];
#pragma unroll
  for (int i = 0; i < mine; ++i) {
    if (exists(i)) sort.tile_counts[at(i)] = before;
    before += counts[i];
  }
  if (warp == kPlanScanWarps - 1 && expert < sort.num_experts) sort.totals[expert] = before;
}

}  // namespace moe
