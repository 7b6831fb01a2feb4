// Logits to weights and experts, for any number of experts: a block per token keeps the keys of the row and selects by
// digits.
#pragma once

#include "cuda/kernels/route.cuh"
#include "cuda/kernels/select.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kLongThreads = 512;
inline constexpr int64_t kSharedKeys = 16384, kSharedOrders = 1024;

struct LongRouteShared {
  BlockTeamShared team;
  SelectShared select;
  uint64_t orders[kSharedOrders];
  int32_t keys[kSharedKeys];
};

// What has no room in shared memory lies in device memory, a part for each block; null where there is room.
struct LongRouteLaunch {
  RouteLaunch at;
  int32_t* keys = nullptr;     // [blocks, E]
  int32_t* groups = nullptr;   // [blocks, G]
  uint64_t* orders = nullptr;  // [blocks, order_length]
  int64_t order_length = 0;    // the power of two from K on
};

// Keys of the groups not kept are masked.
__device__ inline void mask_groups(const RouteParams& p, SelectShared& shared, int32_t* keys, int32_t* groups) {
  const int64_t size = p.experts / p.num_groups;
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32;
  for (int64_t group = warp; group < p.num_groups; group += warps) {
    TopTwo best;
    for (int64_t i = arch::lane_id(); i < size; i += 32) best.add(keys[group * size + i]);
    best.reduce(32);
    if (arch::lane_id() == 0) groups[group] = group_key(p, best);
  }
  arch::sync_block();  // the groups are written
  const uint64_t last = p.top_groups > 0 ? select(shared, groups, p.num_groups, int32_t(p.top_groups)) : kNone;
  const int32_t masked = masked_key(p);
  for (int64_t i = threadIdx.x; i < p.experts; i += blockDim.x)
    if (order_of(groups[i / size], i / size) < last) keys[i] = masked;
  arch::sync_block();  // the keys are masked
}

// chosen [K], thread r writing every size-th from r on.
__device__ inline void choose(const LongRouteLaunch& launch, LongRouteShared& shared, const int32_t* keys,
                              int32_t* chosen) {
  const RouteParams& p = launch.at.p;
  uint64_t* orders = launch.orders ? launch.orders + blockIdx.x * launch.order_length : shared.orders;
  const uint64_t last = select(shared.select, keys, p.experts, int32_t(p.top_k));
  if (threadIdx.x == 0) shared.select.length = 0;
  arch::sync_block();  // the list is empty
  for (int64_t i = threadIdx.x; i < p.experts; i += blockDim.x) {
    const uint64_t order = order_of(keys[i], i);
    if (order >= last) orders[arch::fetch_add(&shared.select.length, 1)] = order;
  }
  for (int64_t i = p.top_k + threadIdx.x; i < launch.order_length; i += blockDim.x) orders[i] = 0;
  sort_orders(orders, launch.order_length);
  for (int64_t k = threadIdx.x; k < p.top_k; k += blockDim.x) chosen[k] = index_of(orders[k]);
}

template <class Team>
__device__ void add_statistics(const RouteLaunch& at, const Team& team, const LongRow& row, const Softmax& softmax,
                               int64_t token, int64_t segment) {
  const RouteParams& p = at.p;
  const float log_sum = log_sum_exp(team, row, softmax);
  if (team.rank == 0) static_cast<float*>(p.logsumexp)[token] = log_sum;
  const Probabilities probability(p.options.score, softmax, team, row);
  if (!counts_somewhere(segment, p.num_segments)) return;
  const int64_t cells = (int64_t(blockIdx.x) % at.statistics.replicas * p.num_segments + segment) * p.experts;
  row.each([&](float z, int id, float) {
    if (id >= p.experts) return;
    add_probability(at.statistics.prob + cells + id, probability(z), at.statistics.units);
  });
}

__global__ void __launch_bounds__(kLongThreads) route_long_kernel(const __grid_constant__ LongRouteLaunch launch) {
  take_turn();
  const RouteLaunch& at = launch.at;
  const RouteParams& p = at.p;
  auto& shared = arch::shared<LongRouteShared>();
  const BlockTeam team(shared.team);
  const bool on_scores = choice_is_on_scores(p), statistics = at.statistics.counts;
  int32_t* keys = launch.keys ? launch.keys + blockIdx.x * p.experts : shared.keys;

  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const LongRow row(team, p.logits, token, p.experts, p.options.softcap, at.aligned);
    Softmax softmax{};
    if (p.options.score == Score::softmax || statistics) softmax = softmax_of(team, row);
    const int64_t segment = statistics ? segment_of(p.segments, token) : -1;
    if (statistics) add_statistics(at, team, row, softmax, token, segment);

    row.each([&](float z, int id, float logit) {
      if (id < p.experts) keys[id] = key_of(on_scores ? choice_of(p, softmax, z, id) : logit);
    });
    team.sync();  // the keys are written
    if (p.num_groups > 1) mask_groups(p, shared.select, keys, launch.groups + blockIdx.x * p.num_groups);
    if (p.top_k > 0) choose(launch, shared, keys, p.chosen + token * p.top_k);
    weigh(p, team, token, p.top_k, softmax, at.statistics, segment);
    team.sync();  // all have left the keys and the list
  }
}

}  // namespace moe
