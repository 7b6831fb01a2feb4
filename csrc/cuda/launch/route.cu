// Starts route and its backward: up to 1024 experts in registers, more by a block per token. Statistics are sums of
// integers that a last kernel turns into means.
#include <algorithm>
#include <cmath>

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/route.cuh"
#include "cuda/kernels/route_backward.cuh"
#include "cuda/kernels/route_long.cuh"
#include "cuda/kernels/route_scale_grad.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {
namespace {

constexpr int64_t kShortExperts = 1024;  // more do not fit into the registers of a warp

struct Lanes {
  int lanes;                 // per token
  Choice<1, 2, 4, 8> quads;  // of four experts, per lane
};

// Few lanes, so that what every lane does once per token is shared by the tokens of a warp: from 8 lanes on a lane
// takes up to 16 experts before their number grows.
Lanes lanes_for(int64_t experts) {
  int lanes = 1;
  while (lanes < 32 && 4 * lanes * (lanes < 8 ? 1 : 4) < experts) lanes *= 2;
  return {lanes, at_least<1, 2, 4, 8>(ceil_div(experts, 4 * lanes))};
}

// counts [S], zeros before, += the tokens of each segment.
void count_tokens(const int32_t* segments, int64_t tokens, int64_t num_segments, int32_t* counts,
                  const Device& device) {
  launch({.grid = unsigned(ceil_div(tokens, kStatisticsThreads)),
          .block = kStatisticsThreads,
          .stream = device.stream(),
          .early = device.starts_early()},
         count_segments_kernel,
         CountSegments{.segments = segments, .tokens = tokens, .num_segments = num_segments, .counts = counts});
}

// Where no bias and no group made the choice, the largest of all experts are chosen, and a renormalised softmax needs
// no other expert: what it is divided by cancels. eps is compared with a sum of at least 1 / E.
RouteOptions without_others(RouteOptions options, int64_t experts) {
  constexpr double kNegligible = 0x1p-40;
  if (options.score != Score::softmax || options.renormalize == Renormalize::none) return options;
  if (std::fabs(options.eps) * double(experts) > kNegligible) return options;
  options.score = Score::softmax_selected;
  if (options.renormalize != Renormalize::pnorm) options.renormalize = Renormalize::none;  // the sum is 1
  return options;
}

GroupWalk group_walk(const RouteParams& p, int lanes) {
  GroupWalk walk;
  while (2 * walk.lanes * p.num_groups <= lanes) walk.lanes *= 2;
  const int64_t size = std::max<int64_t>(p.experts / p.num_groups, 1);
  walk.inverse = int((1 << GroupWalk::kInverseBits) / size + 1);
  return walk;
}

void launch_short(RouteLaunch at, const Device& device) {
  const Lanes lanes = lanes_for(at.p.experts);
  at.lanes = lanes.lanes;
  at.groups = group_walk(at.p, at.lanes);
  // Teams enough to fill a card, and no more: each ends in an addition per expert.
  if (at.statistics.counts) at.tokens_each = int(std::clamp<int64_t>(at.p.tokens * at.lanes / (32 * 2048), 1, 16));
  const int64_t tokens_of_block = int64_t(kRouteThreads / at.lanes) * at.tokens_each;
  std::visit(
      [&](auto quads, auto statistics) {
        launch({.grid = unsigned(ceil_div(at.p.tokens, tokens_of_block)),
                .block = kRouteThreads,
                .shared_bytes = at.p.num_groups > 1 ? sizeof(RouteShared<quads>) : 0,
                .stream = device.stream(),
                .early = device.starts_early()},
               route_short_kernel<quads, statistics>, at);
      },
      lanes.quads, flag(at.statistics.counts));
}

void launch_long(const RouteLaunch& at, const Device& device) {
  const RouteParams& p = at.p;
  const int64_t blocks = std::min<int64_t>(p.tokens, 3 * device.processors());
  LongRouteLaunch args{.at = at, .order_length = 1};
  while (args.order_length < p.top_k) args.order_length *= 2;
  auto room_for = [&](int64_t bytes) { return blocks > 0 ? device.scratch(blocks * bytes) : nullptr; };
  if (p.experts > kSharedKeys) args.keys = static_cast<int32_t*>(room_for(p.experts * 4));
  if (p.num_groups > 1) args.groups = static_cast<int32_t*>(room_for(p.num_groups * 4));
  if (args.order_length > kSharedOrders) args.orders = static_cast<uint64_t*>(room_for(args.order_length * 8));
  launch({.grid = unsigned(blocks),
          .block = kLongThreads,
          .shared_bytes = sizeof(LongRouteShared),
          .stream = device.stream(),
          .early = device.starts_early()},
         route_long_kernel, args);
}

// Zeros to add to, and the number of tokens per segment.
RouteStatistics begin_statistics(const RouteParams& p, const Device& device) {
  const int64_t cells = p.num_segments * p.experts;
  RouteStatistics sums{.replicas = int(std::clamp<int64_t>((1 << 16) / std::max<int64_t>(cells, 1), 1, 32))};
  const int64_t prob_bytes = sums.replicas * cells * 8, count_bytes = sums.replicas * cells * 4;
  const int64_t bytes = prob_bytes + count_bytes + p.num_segments * 4;
  char* memory = static_cast<char*>(device.scratch(std::max<int64_t>(bytes, 1)));
  check(cudaMemsetAsync(memory, 0, size_t(bytes), device.stream()));
  sums.prob = reinterpret_cast<uint64_t*>(memory);
  sums.counts = reinterpret_cast<int32_t*>(memory + prob_bytes);
  if (p.segments) {
    sums.tokens = reinterpret_cast<int32_t*>(memory + prob_bytes + count_bytes);
    count_tokens(p.segments, p.tokens, p.num_segments, sums.tokens, device);
  }
  int unit_bits = 61;  // the sum of the probabilities of all tokens stays below 2^62
  while (unit_bits > 0 && (int64_t(1) << (61 - unit_bits)) < p.tokens) --unit_bits;
  sums.units = float(int64_t(1) << unit_bits);
  return sums;
}

void launch_backward_short(RouteBackwardLaunch at, const Lanes& lanes, const Device& device) {
  at.lanes = lanes.lanes;
  std::visit(
      [&](auto quads) {
        launch({.grid = unsigned(ceil_div(at.p.tokens, kBackwardThreads / at.lanes)),
                .block = kBackwardThreads,
                .shared_bytes = sizeof(RouteBackwardShared<quads>),
                .stream = device.stream(),
                .early = device.starts_early()},
               route_backward_short_kernel<quads>, at);
      },
      lanes.quads);
}

void launch_backward_long(RouteBackwardLaunch at, const Device& device) {
  const int64_t blocks = std::min<int64_t>(at.p.tokens, 4 * device.processors());
  if (at.p.top_k > kSharedSlots && blocks > 0) {
    const int64_t slots = blocks * at.p.top_k;
    auto* scores = static_cast<double*>(device.scratch(slots * 16));
    auto* grads = reinterpret_cast<float*>(scores + slots);
    at.slots = {.ids = reinterpret_cast<int32_t*>(grads + slots), .scores = scores, .grads = grads};
  }
  launch({.grid = unsigned(blocks),
          .block = kLongBackwardThreads,
          .shared_bytes = sizeof(LongRouteBackwardShared),
          .stream = device.stream(),
          .early = device.starts_early()},
         route_backward_long_kernel, at);
}

// How many chunks there are depends on shapes alone, and so does the result.
void sum_scale_terms(const RouteBackwardParams& p, const double* terms, const Device& device) {
  const int64_t rows = p.tokens * p.top_k, chunks = std::clamp<int64_t>(rows / 4096, 1, 256);
  const int64_t expert_blocks = ceil_div(p.experts, kScaleGradThreads);
  const ScaleGradLaunch at{
      .chosen = p.chosen,
      .terms = terms,
      .rows = rows,
      .experts = p.experts,
      .chunks = chunks,
      .chunk_rows = ceil_div(rows, chunks),
      .partial = static_cast<double*>(device.scratch(std::max<int64_t>(chunks * p.experts, 1) * 8)),
      .out = static_cast<float*>(p.grad_expert_scale),
  };
  launch({.grid = unsigned(expert_blocks * chunks),
          .block = kScaleGradThreads,
          .shared_bytes = sizeof(ScaleGradShared),
          .stream = device.stream(),
          .early = device.starts_early()},
         scale_grad_of_chunks_kernel, at);
  launch({.grid = unsigned(expert_blocks),
          .block = kScaleGradThreads,
          .stream = device.stream(),
          .early = device.starts_early()},
         scale_grad_kernel, at);
}

}  // namespace

void route(const RouteParams& p, const Device& device) {
  float_type(p.logits.dtype, "route");  // throws for float64
  RouteLaunch at{.p = p, .aligned = has_aligned_quads(p.logits)};
  if (p.experts == 0) at.p.num_groups = 1;
  if (!choice_is_on_scores(at.p)) at.p.options = without_others(p.options, p.experts);
  if (p.counts) at.statistics = begin_statistics(p, device);
  if (p.experts <= kShortExperts) launch_short(at, device);
  else launch_long(at, device);
  if (!p.counts) return;

  const int64_t cells = p.num_segments * p.experts;
  launch({.grid = unsigned(ceil_div(cells, kStatisticsThreads)),
          .block = kStatisticsThreads,
          .stream = device.stream(),
          .early = device.starts_early()},
         finish_statistics_kernel,
         FinishStatistics{.sums = at.statistics,
                          .tokens = p.tokens,
                          .experts = p.experts,
                          .cells = cells,
                          .counts = p.counts,
                          .mean_prob = static_cast<float*>(p.mean_prob)});
}

void route_backward(const RouteBackwardParams& p, const Device& device) {
  float_type(p.logits.dtype, "route_backward");  // throws for float64
  RouteBackwardLaunch at{
      .p = p, .reads_quads = has_aligned_quads(p.logits), .writes_quads = has_aligned_quads(p.grad_logits)};
  if (p.grad_mean_prob && p.segments) {
    const int64_t bytes = p.num_segments * 4;
    auto* tokens = static_cast<int32_t*>(device.scratch(std::max<int64_t>(bytes, 1)));
    check(cudaMemsetAsync(tokens, 0, size_t(bytes), device.stream()));
    count_tokens(p.segments, p.tokens, p.num_segments, tokens, device);
    at.tokens_of_segment = tokens;
  }
  const bool of_scale = p.expert_scale && p.grad_weights;
  if (of_scale) at.scale_terms = static_cast<double*>(device.scratch(std::max<int64_t>(p.tokens * p.top_k, 1) * 8));

  const Lanes lanes = lanes_for(p.experts);
  const int64_t slots = std::visit([&](auto quads) { return int64_t(4 * quads * lanes.lanes); }, lanes.quads);
  if (p.experts <= kShortExperts && p.top_k <= slots) launch_backward_short(at, lanes, device);
  else launch_backward_long(at, device);

  if (of_scale) sum_scale_terms(p, at.scale_terms, device);
  else if (p.expert_scale) check(cudaMemsetAsync(p.grad_expert_scale, 0, size_t(p.experts * 4), device.stream()));
}

}  // namespace moe
