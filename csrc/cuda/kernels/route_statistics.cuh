// counts and mean_prob: sums over tokens, of any segments in any order. They are sums of integers, to which every
// thread adds when it likes: a probability is a whole number of units, so fine that the sum has more bits than a
// float64's.
#pragma once

#include "cuda/arch/atomic.cuh"
#include "cuda/kernels/rank.cuh"
#include "cuda/kernels/turn.cuh"
#include "stages/params.h"

namespace moe {

inline constexpr int kStatisticsThreads = 256;

struct RouteStatistics {
  uint64_t* prob = nullptr;   // [replicas, S, E]; null: no statistics
  int32_t* counts = nullptr;  // [replicas, S, E]
  int32_t* tokens = nullptr;  // [S]; null: all tokens are of segment 0
  int replicas = 1;           // blocks take turns, so that they seldom meet at one address
  float units = 1;            // of a probability of 1, a power of two
};

inline constexpr uint64_t kNanBit = uint64_t(1) << 63;  // no sum of probabilities reaches this bit

__device__ inline bool counts_somewhere(int64_t segment, int64_t num_segments) {
  return segment >= 0 && segment < num_segments;
}

__device__ inline int64_t segment_of(const int32_t* segments, int64_t token) { return segments ? segments[token] : 0; }

__device__ inline void add_probability(uint64_t* to, float prob, float units) {
  if (prob != prob) arch::set_bits(to, kNanBit);
  else if (prob != 0) arch::add(to, uint64_t(prob * units));
}

struct CountSegments {
  const int32_t* segments;  // [T]
  int64_t tokens, num_segments;
  int32_t* counts;  // [S]
};

__global__ void __launch_bounds__(kStatisticsThreads) count_segments_kernel(const __grid_constant__ CountSegments p) {
  take_turn();
  const int64_t token = int64_t(blockIdx.x) * kStatisticsThreads + threadIdx.x;
  const int32_t segment = token < p.tokens ? p.segments[token] : -1;
  const uint32_t same = arch::match(segment);
  if (!counts_somewhere(segment, p.num_segments)) return;
  if (arch::lowest_bit(same) == arch::lane_id()) arch::add(p.counts + segment, arch::count_bits(same));
}

struct FinishStatistics {
  RouteStatistics sums;
  int64_t tokens, experts, cells;  // cells = S * E
  int32_t* counts;                 // [S, E]
  float* mean_prob;                // [S, E]
};

__global__ void __launch_bounds__(kStatisticsThreads)
    finish_statistics_kernel(const __grid_constant__ FinishStatistics p) {
  take_turn();
  const int64_t cell = int64_t(blockIdx.x) * kStatisticsThreads + threadIdx.x;
  if (cell >= p.cells) return;

  int32_t count = 0;
  uint64_t sum = 0, nan = 0;
  for (int replica = 0; replica < p.sums.replicas; ++replica) {
    const uint64_t prob = p.sums.prob[replica * p.cells + cell];
    count += p.sums.counts[replica * p.cells + cell];
    sum += prob & ~kNanBit;
    nan |= prob & kNanBit;
  }

  const int64_t tokens = p.sums.tokens ? p.sums.tokens[cell / p.experts] : p.tokens;
  p.counts[cell] = count;
  p.mean_prob[cell] = nan ? kNan : float(double(sum) / (double(p.sums.units) * double(tokens > 1 ? tokens : 1)));
}

}  // namespace moe
