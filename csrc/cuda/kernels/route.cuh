// Logits to weights and experts, for up to 1024 experts: a few lanes hold a token's logits in registers, choose the
// largest one after another, and weigh them. A token's logits are read once.
#pragma once

#include "cuda/kernels/groups.cuh"
#include "cuda/kernels/route_statistics.cuh"
#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kRouteThreads = 128;

struct RouteLaunch {
  RouteParams p;
  RouteStatistics statistics;
  bool aligned = false;  // rows may be read four values at a time
  int lanes = 32;        // per token
  int tokens_each = 1;   // of each team
  GroupWalk groups;
};

// Working space of the groups; of each team in turn.
template <int kQuads>
struct RouteShared {
  int32_t keys[kRouteThreads * 4 * kQuads];
  int32_t groups[kRouteThreads * 4 * kQuads];
};

// Otherwise the logits are compared: no rounding of a score makes a tie of them.
__host__ __device__ inline bool choice_is_on_scores(const RouteParams& p) {
  return p.selection_bias || p.num_groups > 1;
}

__device__ inline float choice_of(const RouteParams& p, const Softmax& softmax, float z, int64_t id) {
  const float score = p.options.score == Score::softmax ? softmax(z) : score_of(p.options.score, z);
  return p.selection_bias ? score + static_cast<const float*>(p.selection_bias)[id] : score;
}

// The weights of the chosen experts [count], thread r of the team taking every size-th from r on, which it wrote
// itself.
template <class Team>
__device__ void weigh(const RouteParams& p, const Team& team, int64_t token, int64_t count, Softmax softmax,
                      const RouteStatistics& statistics, int64_t segment) {
  const Softcap softcap(p.options.softcap);
  const int32_t* chosen = p.chosen + token * p.top_k;
  auto read_z = [&](int64_t k) { return softcap.z(softcap.tangent(read(p.logits, token, chosen[k]))); };
  const float first = team.rank < count ? read_z(team.rank) : -kInfinity;
  auto z = [&](int64_t k) { return k == team.rank ? first : read_z(k); };

  if (p.options.score == Score::softmax_selected) {
    softmax = {first, 0};
    for (int64_t k = team.rank; k < count; k += team.size) softmax.max = fmaxf(softmax.max, z(k));
    softmax.max = value_of(team.max(key_of(softmax.max)));
    for (int64_t k = team.rank; k < count; k += team.size) softmax.sum += softmax.exponential(z(k));
    softmax.sum = float(team.sum(softmax.sum));
  }
  double sum = 0;
  for (int64_t k = team.rank; k < count; k += team.size)
    sum += term(p.options, chosen_score(p.options.score, z(k), softmax));
  const float by = float(denominator(p.options, team.sum(sum))), scale = float(p.options.scale);

  float* weights = static_cast<float*>(p.weights) + token * p.top_k;
  const bool counted = statistics.counts && counts_somewhere(segment, p.num_segments);
  const int64_t cells = (int64_t(blockIdx.x) % statistics.replicas * p.num_segments + segment) * p.experts;
  for (int64_t k = team.rank; k < count; k += team.size) {
    float weight = chosen_score(p.options.score, z(k), softmax) / by * scale;
    if (p.expert_scale) weight *= static_cast<const float*>(p.expert_scale)[chosen[k]];
    weights[k] = weight;
    if (counted) arch::add(statistics.counts + cells + chosen[k], 1);
  }
}

// One thread's sums of probabilities over tokens of one segment; few enough that float32 keeps them well.
template <int kQuads>
struct ProbabilitySums {
  float sums[4 * kQuads];
  int64_t segment = -1;

  template <class Row>
  __device__ void begin(const RouteLaunch& at, const Row& row, int64_t next) {
    if (next == segment) return;
    flush(at, row);
    segment = next;
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) sums[i] = 0;
  }

  template <class Row>
  __device__ void flush(const RouteLaunch& at, const Row& row) const {
    if (!counts_somewhere(segment, at.p.num_segments)) return;
    const int64_t cells = (int64_t(blockIdx.x) % at.statistics.replicas * at.p.num_segments + segment) * at.p.experts;
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i)
      if (row.id(i) < at.p.experts)
        add_probability(at.statistics.prob + cells + row.id(i), sums[i], at.statistics.units);
  }
};

template <int kQuads, bool statistics>
__global__ void __launch_bounds__(kRouteThreads, blocks_per_processor(kQuads))
    route_short_kernel(const __grid_constant__ RouteLaunch at) {
  take_turn();
  constexpr int kValues = 4 * kQuads;
  const RouteParams& p = at.p;
  const Score score = p.options.score;
  const bool on_scores = choice_is_on_scores(p);
  const LaneTeam team(at.lanes);
  const int teams = kRouteThreads / at.lanes, own_team = int(threadIdx.x) / at.lanes;
  const int64_t block_first = int64_t(blockIdx.x) * teams * at.tokens_each;

  ShortRow<kQuads> row(team, p.experts, p.options.softcap);
  Ranking<kQuads> ranking;
  ProbabilitySums<kQuads> probabilities;
  for (int n = 0; n < at.tokens_each; ++n) {
    const int64_t warp_token = block_first + n * teams + (own_team - arch::lane_id() / at.lanes);
    if (warp_token >= p.tokens) break;
    const int64_t wanted = block_first + n * teams + own_team;
    const bool active = wanted < p.tokens;  // other teams of the warp go along with the last token
    const int64_t token = active ? wanted : p.tokens - 1;

    row.load(p.logits, token, at.aligned);
#pragma unroll
    for (int i = 0; i < kValues; ++i) ranking.keys[i] = key_of(row.logit(i));
    row.cap();
    Softmax softmax{};
    if (score == Score::softmax || statistics) softmax = softmax_of(team, row);

    const int64_t segment = active && statistics ? segment_of(p.segments, token) : -1;
    if (statistics) {
      const float log_sum = log_sum_exp(team, row, softmax);
      if (active && team.rank == 0) static_cast<float*>(p.logsumexp)[token] = log_sum;
      probabilities.begin(at, row, segment);
      const Probabilities probability(score, softmax, team, row);
      row.each([&](float z, int, int i) { probabilities.sums[i] += probability(z); });
    }

    if (on_scores)
      row.each([&](float z, int id, int i) {
        ranking.keys[i] = id < p.experts ? key_of(choice_of(p, softmax, z, id)) : kTaken;
      });
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      ranking.ids[i] = row.id(i);
      if (row.id(i) >= p.experts) ranking.keys[i] = kTaken;
    }
    if (p.num_groups > 1) {
      auto& shared = arch::shared<RouteShared<kQuads>>();
      const int space = own_team * at.lanes * kValues;
      mask_groups(p, team, at.groups, shared.keys + space, shared.groups + space, ranking);
    }

    ranking.sort();
    int32_t* chosen = p.chosen + token * p.top_k;
    int32_t own = 0;
    for (int64_t k = 0; k < p.top_k; ++k) {
      const int32_t id = ranking.take(team);
      const int lane = int(k) & (team.size - 1);
      if (lane == team.rank) own = id;
      if (active && (lane == team.size - 1 || k == p.top_k - 1) && team.rank <= lane)
        chosen[k - lane + team.rank] = own;
    }
    weigh(p, team, token, active ? p.top_k : 0, softmax, at.statistics, segment);
  }
  if (statistics) probabilities.flush(at, row);
}

}  // namespace moe
