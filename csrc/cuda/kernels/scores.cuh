// From logits to scores and from the scores of the chosen to weights: what route and its backward share. float32, with
// the accurate functions of the CUDA library; in the backward float64 for the chosen.
#pragma once

#include "cuda/kernels/row.cuh"

namespace moe {

struct Softmax {
  float max, sum;

  template <class F>
  __device__ F exponential(F z) const {
    return exp(z - F(max));
  }
  template <class F>
  __device__ F operator()(F z) const {
    return exponential(z) / F(sum);
  }
};

template <class Team, class Row>
__device__ Softmax softmax_of(const Team& team, const Row& row) {
  Softmax softmax{-kInfinity, 0};
  row.each([&](float z, int, auto) { softmax.max = fmaxf(softmax.max, z); });
  softmax.max = value_of(team.max(key_of(softmax.max)));
  softmax.sum = float(team.sum(row.sum([&](float z, int) { return softmax.exponential(z); })));
  return softmax;
}

// As torch.logsumexp where all z are -inf or one is inf.
template <class Team, class Row>
__device__ float log_sum_exp(const Team& team, const Row& row, const Softmax& softmax) {
  int32_t any_nan = 0;
  row.each([&](float z, int, auto) { any_nan |= z != z; });
  if (team.max(any_nan)) return kNan;
  return fabsf(softmax.max) == kInfinity ? softmax.max : softmax.max + logf(softmax.sum);
}

// Below it softplus(z) and e^z agree to the last bit, and e^(z / 2) is the root of numbers too small to hold.
inline constexpr float kSoftplusTail = -20;

template <class F>
__device__ F sigmoid(F z) {
  const F e = exp(-fabs(z));  // keeps the lower tail's denormal results
  return (z < 0 ? e : F(1)) / (1 + e);
}

// The scores that are functions of their own logit alone; softmax and its kin leave z as it is.
template <class F>
__device__ F score_of(Score score, F z) {
  if (score == Score::sigmoid) return sigmoid(z);
  if (score != Score::sqrtsoftplus) return z;
  return z < F(kSoftplusTail) ? exp(F(0.5) * z) : sqrt((z > 0 ? z : F(0)) + log1p(exp(-fabs(z))));
}

// d score / dz.
__device__ inline float score_slope(Score score, float z) {
  if (score == Score::sigmoid) {
    const float e = expf(-fabsf(z));
    return e / ((1 + e) * (1 + e));
  }
  if (score != Score::sqrtsoftplus) return 1;
  const float s = score_of(score, z);
  return z < kSoftplusTail ? 0.5f * s : 0.5f * sigmoid(z) / s;
}

// Whether a score is a function of its own logit that mean_prob divides by the sum over the experts.
__host__ __device__ inline bool is_elementwise(Score score) {
  return score == Score::sigmoid || score == Score::sqrtsoftplus;
}

// A token's routing probabilities, whose mean is mean_prob: softmax, or an elementwise score over the sum of them.
struct Probabilities {
  Score score;
  Softmax softmax;
  float sum = 1;  // of the scores

  template <class Team, class Row>
  __device__ Probabilities(Score score, const Softmax& softmax, const Team& team, const Row& row)
      : score(score), softmax(softmax) {
    if (is_elementwise(score)) sum = float(team.sum(row.sum([score](float z, int) { return score_of(score, z); })));
  }

  __device__ float operator()(float z) const { return is_elementwise(score) ? score_of(score, z) / sum : softmax(z); }
};

// softmax is that of all experts, or of the chosen for softmax_selected.
template <class F>
__device__ F chosen_score(Score score, F z, const Softmax& softmax) {
  return score == Score::softmax || score == Score::softmax_selected ? softmax(z) : score_of(score, z);
}

// What a chosen score adds to the sum that denominator() takes.
__device__ inline double term(const RouteOptions& options, double score) {
  if (options.renormalize != Renormalize::pnorm) return score;
  const double size = fabs(score);
  return options.p == 1 ? size : options.p == 2 ? size * size : pow(size, options.p);
}

__device__ inline double denominator(const RouteOptions& options, double sum) {
  switch (options.renormalize) {
    case Renormalize::none: return 1;
    case Renormalize::sum: return sum + options.eps;
    case Renormalize::clamp: return sum < options.eps ? options.eps : sum;
    default: return options.p == 1 ? sum : options.p == 2 ? sqrt(sum) : pow(sum, 1 / options.p);
  }
}

}  // namespace moe
