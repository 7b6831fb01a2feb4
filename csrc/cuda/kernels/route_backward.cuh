// The gradients of route with respect to the logits and the expert scales. Scores are computed again from the logits,
// so that nothing but logits and chosen experts is kept.
//
// With z the (capped) logits, p = softmax(z), s the score:
//   weights    w_k = s_k / D(s) * scale * expert_scale_k, D the renormalisation's denominator
//   mean_prob  the mean of p, or of s / sum(s) where the score is elementwise
//   logsumexp  d/dz = p
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/route_statistics.cuh"
#include "cuda/kernels/scores.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kBackwardThreads = 128, kLongBackwardThreads = 512;
inline constexpr int64_t kSharedSlots = 1024;

// A token's slots. Thread r of its team fills in every size-th from r on; then all read them.
struct Slots {
  int32_t* ids;  // -1 where the expert is out of range: skipped in every sum
  double* scores;
  float* grads;  // of the scores, and in the end of p for softmax, of z for others
};

struct RouteBackwardLaunch {
  RouteBackwardParams p;
  const int32_t* tokens_of_segment = nullptr;  // [S]; null: all tokens are of segment 0
  double* scale_terms = nullptr;  // [T, K] what each slot adds to the gradient of its expert's scale; or null
  bool reads_quads = false, writes_quads = false;
  int lanes = 32;  // per token
  Slots slots{};   // [blocks, K] each where shared memory is too small; or null
};

template <int kQuads>
struct RouteBackwardShared {
  int32_t ids[kBackwardThreads * 4 * kQuads];
  double scores[kBackwardThreads * 4 * kQuads];
  float grads[kBackwardThreads * 4 * kQuads];
};

struct LongRouteBackwardShared {
  BlockTeamShared team;
  int32_t ids[kSharedSlots];
  double scores[kSharedSlots];
  float grads[kSharedSlots];
};

// d (sum of |s|^p)^(1/p) / ds; 0 at s = 0, as in torch.
__device__ inline double norm_slope(double s, double norm, double p) {
  const double sign = double(s > 0) - double(s < 0);
  if (p == 1 || s == 0) return sign;
  return p == 2 ? s / norm : sign * pow(fabs(s) / norm, p - 1);
}

// What one team knows of its token.
template <class Team, class Row>
struct RouterBackward {
  const RouteBackwardLaunch& at;
  const Team& team;
  const Row& row;
  const Slots& slots;
  int64_t token;
  int count;  // slots

  __device__ float z_of(int32_t id) const {
    const Softcap softcap(at.p.options.softcap);
    return softcap.z(softcap.tangent(read(at.p.logits, token, id)));
  }

  // f(k, id) for the slots of this thread.
  template <class F>
  __device__ __forceinline__ void each_slot(const F& f) const {
    for (int k = team.rank; k < count; k += team.size)
      if (slots.ids[k] >= 0) f(k, slots.ids[k]);
  }

  __device__ void find_scores(Softmax softmax) const {
    const Score score = at.p.options.score;
    for (int k = team.rank; k < count; k += team.size) {
      const int32_t id = at.p.chosen[token * at.p.top_k + k];
      slots.ids[k] = id >= 0 && id < at.p.experts ? id : -1;
    }
    if (score == Score::softmax_selected) {
      softmax = {-kInfinity, 0};
      each_slot([&](int, int32_t id) { softmax.max = fmaxf(softmax.max, z_of(id)); });
      softmax.max = value_of(team.max(key_of(softmax.max)));
      each_slot([&](int, int32_t id) { softmax.sum += softmax.exponential(z_of(id)); });
      softmax.sum = float(team.sum(softmax.sum));
    }
    each_slot([&](int k, int32_t id) { slots.scores[k] = chosen_score(score, double(z_of(id)), softmax); });
  }

  // Of the score of slot k, before it was divided.
  __device__ double grad_of_normalised(int k, int32_t id) const {
    double grad = double(static_cast<const float*>(at.p.grad_weights)[token * at.p.top_k + k]) * at.p.options.scale;
    if (at.p.expert_scale) grad *= double(static_cast<const float*>(at.p.expert_scale)[id]);
    return grad;
  }

  // slots.grads = the gradients of the chosen scores; also what the slots add to those of the expert scales. In
  // float64, because much of a gradient cancels.
  __device__ void through_renormalisation() const {
    const RouteOptions& options = at.p.options;
    double sum = 0, dot = 0;
    each_slot([&](int k, int32_t) { sum += term(options, slots.scores[k]); });
    if (options.renormalize != Renormalize::none) sum = team.sum(sum);
    const double by = denominator(options, sum);

    each_slot([&](int k, int32_t id) {
      const int64_t slot = token * at.p.top_k + k;
      const double normalised = by == 1 ? slots.scores[k] : slots.scores[k] / by;
      const double grad = grad_of_normalised(k, id);
      if (at.scale_terms)
        at.scale_terms[slot] = double(static_cast<const float*>(at.p.grad_weights)[slot]) * options.scale * normalised;
      slots.grads[k] = float(grad);
      dot += grad * normalised;
    });
    if (options.renormalize == Renormalize::none) return;
    dot = team.sum(dot);
    if (options.renormalize == Renormalize::clamp && sum < options.eps) dot = 0;
    each_slot([&](int k, int32_t id) {
      const double slope = options.renormalize == Renormalize::pnorm ? norm_slope(slots.scores[k], by, options.p) : 1;
      slots.grads[k] = float((grad_of_normalised(k, id) - dot * slope) / by);
    });
  }

  // slots.grads = the gradients of z, but for softmax, where all experts have a part. Returns <grads, scores>.
  __device__ float through_scores() const {
    const Score score = at.p.options.score;
    float dot = 0;
    if (score == Score::softmax || score == Score::softmax_selected) {
      double own = 0;
      each_slot([&](int k, int32_t) { own += double(slots.grads[k]) * slots.scores[k]; });
      dot = float(team.sum(own));
    }
    if (score == Score::softmax) return dot;
    each_slot([&](int k, int32_t id) {
      if (score == Score::softmax_selected) slots.grads[k] = float(slots.scores[k]) * (slots.grads[k] - dot);
      else slots.grads[k] *= score_slope(score, z_of(id));
    });
    return 0;
  }

  // What the slots add to four neighbours.
  __device__ Quad of_slots(int first) const {
    Quad sum{};
    for (int k = 0; k < count; ++k) {
      const int32_t id = slots.ids[k];
      if ((id & ~3) != first) continue;
      for (int i = 0; i < 4; ++i) sum[i] += (id & 3) == i ? slots.grads[k] : 0;
    }
    return sum;
  }

  __device__ void run() const {
    const RouteBackwardParams& p = at.p;
    const Score score = p.options.score;
    const bool elementwise = is_elementwise(score), of_prob = p.grad_mean_prob;
    const bool through_softmax = score == Score::softmax || p.grad_logsumexp || (of_prob && !elementwise);
    Softmax softmax{};
    if (through_softmax) softmax = softmax_of(team, row);

    float dot = 0;
    if (p.grad_weights) {
      find_scores(softmax);
      through_renormalisation();
      dot = through_scores();
    }
    team.sync();  // the slots are filled in

    const int64_t segment = of_prob ? segment_of(p.segments, token) : -1;
    const float* grad_prob = nullptr;  // [E]; null where the token counts nowhere
    float share = 0;
    if (counts_somewhere(segment, p.num_segments)) {
      grad_prob = static_cast<const float*>(p.grad_mean_prob) + segment * p.experts;
      share = 1 / float(at.tokens_of_segment ? at.tokens_of_segment[segment] : p.tokens);
    }
    auto prob_grad = [&](int id) { return grad_prob && id < p.experts ? grad_prob[id] * share : 0.0f; };

    float sum = 1, dot_of_prob = 0;
    if (of_prob && elementwise) {
      sum = float(team.sum(row.sum([&](float z, int) { return score_of(score, z); })));
      dot_of_prob =
          float(team.sum(row.sum([&](float z, int id) { return prob_grad(id) * (score_of(score, z) / sum); })));
    } else if (of_prob) {
      dot += float(team.sum(row.sum([&](float z, int id) { return prob_grad(id) * softmax(z); })));
    }
    if (count < 0) return;  // a team without a token

    const float grad_logsumexp = p.grad_logsumexp ? static_cast<const float*>(p.grad_logsumexp)[token] : 0;
    row.write(p.grad_logits, token, at.writes_quads, [&](const Quad& z, const Quad& slope, int first) {
      Quad out = of_slots(first);
      for (int i = 0; i < 4; ++i) {
        const float grad = prob_grad(first + i);
        if (through_softmax) {
          const float of_p = (elementwise ? 0 : grad) + (score == Score::softmax ? out[i] : 0);
          const float of_z = softmax(z[i]) * (of_p - dot + grad_logsumexp);
          out[i] = score == Score::softmax ? of_z : out[i] + of_z;
        }
        if (grad_prob && elementwise) out[i] += score_slope(score, z[i]) * ((grad - dot_of_prob) / sum);
        out[i] *= slope[i];
      }
      return out;
    });
  }
};

template <int kQuads>
__global__ void __launch_bounds__(kBackwardThreads, blocks_per_processor(kQuads))
    route_backward_short_kernel(const __grid_constant__ RouteBackwardLaunch at) {
  take_turn();
  const RouteBackwardParams& p = at.p;
  const LaneTeam team(at.lanes);
  const int own_team = int(threadIdx.x) / at.lanes;
  const int64_t block_first = int64_t(blockIdx.x) * (kBackwardThreads / at.lanes);
  if (block_first + own_team - arch::lane_id() / at.lanes >= p.tokens) return;  // the whole warp
  const bool active = block_first + own_team < p.tokens;  // other teams of the warp go along with the last token
  const int64_t token = active ? block_first + own_team : p.tokens - 1;

  ShortRow<kQuads> row(team, p.experts, p.options.softcap);
  row.load(p.logits, token, at.reads_quads);
  row.cap();
  auto& shared = arch::shared<RouteBackwardShared<kQuads>>();
  const int space = own_team * at.lanes * 4 * kQuads;
  const Slots slots{shared.ids + space, shared.scores + space, shared.grads + space};
  const int count = !active ? -1 : p.grad_weights ? int(p.top_k) : 0;
  RouterBackward<LaneTeam, ShortRow<kQuads>>{at, team, row, slots, token, count}.run();
}

__global__ void __launch_bounds__(kLongBackwardThreads)
    route_backward_long_kernel(const __grid_constant__ RouteBackwardLaunch at) {
  take_turn();
  const RouteBackwardParams& p = at.p;
  auto& shared = arch::shared<LongRouteBackwardShared>();
  const BlockTeam team(shared.team);
  Slots slots{shared.ids, shared.scores, shared.grads};
  const int64_t space = blockIdx.x * p.top_k;
  if (at.slots.ids) slots = {at.slots.ids + space, at.slots.scores + space, at.slots.grads + space};

  for (int64_t token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const LongRow row(team, p.logits, token, p.experts, p.options.softcap, at.reads_quads);
    const int count = p.grad_weights ? int(p.top_k) : 0;
    RouterBackward<BlockTeam, LongRow>{at, team, row, slots, token, count}.run();
    team.sync();  // all have left the slots
  }
}

}  // namespace moe
