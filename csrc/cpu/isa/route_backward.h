// The gradients of route with respect to the logits and the expert scales. Scores are computed again from the logits,
// so that nothing but logits and chosen experts is kept.
//
// With z the (capped) logits, p = softmax(z), s the score:
//   weights    w_k = s_k / D(s) * scale * expert_scale_k, D the renormalisation's denominator
//   mean_prob  the mean of p, or of s / sum(s) where the score is elementwise
//   logsumexp  d/dz = p
#pragma once

#include "cpu/isa/scores.h"

namespace moe::MOE_ISA {

template <class C>
class RouterBackward {
 public:
  RouterBackward(const RouteBackwardParams& p, const int64_t* tokens_of_segment, double* grad_expert_scale)
      : p_(p),
        expert_scale_(static_cast<const C*>(p.expert_scale)),
        tokens_of_segment_(tokens_of_segment),
        grad_expert_scale_(grad_expert_scale),
        padded_(Ranking<C>::padded(p.experts)),
        padded_k_(Ranking<double>::padded(p.top_k)),
        z_(padded_),
        slope_(padded_),
        e_(padded_),
        g_(padded_),
        grad_z_(padded_),
        ids_(padded_k_),
        slots_(padded_k_),
        z_k_(padded_k_),
        work_k_(padded_k_),
        s_k_(padded_k_),
        grad_k_(padded_k_) {}

  void token(int64_t t) {
    load_row<C>(p_.logits, t, p_.experts, z_);
    if (p_.grad_weights) gather_chosen(t);
    if (p_.options.softcap != 0) apply_softcap<C>(z_, p_.experts, C(p_.options.softcap), slope_);
    fill(grad_z_, C(0));

    const Score score = p_.options.score;
    const C* grad_prob = row_of_grad_mean_prob(t);
    const C grad_logsumexp = p_.grad_logsumexp ? static_cast<const C*>(p_.grad_logsumexp)[t] : C(0);
    const bool through_softmax = score == Score::softmax || p_.grad_logsumexp || (grad_prob && !is_elementwise(score));
    if (through_softmax) {
      softmax_ = exponentials<C>(z_, padded_, e_);
      if (grad_prob && !is_elementwise(score)) load_grad_prob(grad_prob);
      else fill(g_, C(0));
    }
    if (p_.grad_weights) add_weights();
    if (through_softmax) add_softmax(grad_logsumexp);
    if (grad_prob && is_elementwise(score)) {
      load_grad_prob(grad_prob);
      add_normalised_scores();
    }
    write_row(t);
  }

 private:
  MOE_INLINE void fill(C* row, C value) {
    for (int64_t i = 0; i < padded_; i += kLanes<C>) store<C>(row + i, broadcast(value));
  }

  // Null where the token counts in no segment.
  const C* row_of_grad_mean_prob(int64_t t) {
    const int64_t segment = p_.segments ? p_.segments[t] : 0;
    if (!p_.grad_mean_prob || segment < 0 || segment >= p_.num_segments) return nullptr;
    share_ = C(1) / C(tokens_of_segment_[segment]);
    return static_cast<const C*>(p_.grad_mean_prob) + segment * p_.experts;
  }

  void load_grad_prob(const C* grad_prob) {
    for (int64_t i = 0; i < padded_; i += kLanes<C>) store<C>(g_ + i, load<C>(grad_prob + i, p_.experts - i) * share_);
  }

  // Slots whose expert is out of range are skipped, here and in every sum below. The chosen are float64 from the logit
  // on: a term of an expert scale's gradient would bring in all the roundings of a score.
  void gather_chosen(int64_t t) {
    count_ = 0;
    for (int64_t k = 0; k < p_.top_k; ++k) {
      const int64_t id = p_.chosen[t * p_.top_k + k];
      if (id < 0 || id >= p_.experts) continue;
      ids_[count_] = int32_t(id);
      slots_[count_] = t * p_.top_k + k;
      z_k_[count_++] = z_[id];
    }
    for (int64_t k = count_; k < padded_k_; ++k) z_k_[k] = kMinusInf<double>;
    if (p_.options.softcap != 0) apply_softcap<double>(z_k_, count_, p_.options.softcap);
  }

  void add_weights() {
    const Score score = p_.options.score;
    const int64_t count = count_;
    score_chosen();
    through_renormalisation(count);

    if (score == Score::softmax) {
      for (int64_t k = 0; k < count; ++k) g_[ids_[k]] += C(grad_k_[k]);
    } else if (score == Score::softmax_selected) {
      double dot = 0;
      for (int64_t k = 0; k < count; ++k) dot += grad_k_[k] * s_k_[k];
      for (int64_t k = 0; k < count; ++k) grad_z_[ids_[k]] += C(s_k_[k] * (grad_k_[k] - dot));
    } else {
      for (int64_t i = 0; i < count; i += kLanes<double>)
        store<double>(work_k_ + i, score_slope<double>(score, load<double>(z_k_ + i)));
      for (int64_t k = 0; k < count; ++k) grad_z_[ids_[k]] += C(grad_k_[k] * work_k_[k]);
    }
  }

  void score_chosen() {
    const int64_t padded = round_to_lanes<double>(count_);
    if (p_.options.score == Score::softmax) {
      for (int64_t k = 0; k < padded; k += kLanes<double>)
        store<double>(s_k_ + k, exp<double>(load<double>(z_k_ + k) - double(softmax_.max)) * (1 / softmax_.sum));
    } else if (p_.options.score == Score::softmax_selected) {
      const double share = 1 / exponentials<double>(z_k_, padded, s_k_).sum;
      for (int64_t k = 0; k < count_; ++k) s_k_[k] *= share;
    } else {
      scores<double>(p_.options.score, z_k_, padded, s_k_);
    }
  }

  // grad_k_ = the gradients of the chosen scores; adds those of the expert scales.
  void through_renormalisation(int64_t count) {
    const RouteOptions& options = p_.options;
    const C* grad_weights = static_cast<const C*>(p_.grad_weights);
    const double by = denominator(options, count, [&](int64_t k) { return s_k_[k]; });
    double dot = 0, sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double grad = double(grad_weights[slots_[k]]) * options.scale, normalised = s_k_[k] / by;
      if (grad_expert_scale_) grad_expert_scale_[ids_[k]] += grad * normalised;
      grad_k_[k] = expert_scale_ ? grad * double(expert_scale_[ids_[k]]) : grad;
      dot += grad_k_[k] * normalised;
      sum += s_k_[k];
    }
    if (options.renormalize == Renormalize::none) return;
    if (options.renormalize == Renormalize::clamp && sum < options.eps) dot = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double slope = options.renormalize == Renormalize::pnorm ? norm_slope(s_k_[k], by, options.p) : 1;
      grad_k_[k] = (grad_k_[k] - dot * slope) / by;
    }
  }

  // d (sum of |s|^p)^(1/p) / ds; 0 at s = 0, as in torch.
  static double norm_slope(double s, double norm, double p) {
    const double sign = double(s > 0) - double(s < 0);
    if (p == 1 || s == 0) return sign;
    return p == 2 ? s / norm : sign * __builtin_pow(__builtin_fabs(s) / norm, p - 1);
  }

  // grad_z += p * (g - <g, p> + grad_logsumexp)
  void add_softmax(C grad_logsumexp) {
    const C dot = C(sum_over<C>(padded_, [this, sum = C(softmax_.sum)](int64_t i) {
      const Vec<C> p = load<C>(e_ + i) / sum;
      store<C>(e_ + i, p);
      return load<C>(g_ + i) * p;
    }));
    for (int64_t i = 0; i < padded_; i += kLanes<C>)
      store<C>(grad_z_ + i, load<C>(grad_z_ + i) + load<C>(e_ + i) * (load<C>(g_ + i) - dot + grad_logsumexp));
  }

  // grad_z += slope(s) * (g - <g, s / sum(s)>) / sum(s)
  void add_normalised_scores() {
    const Score score = p_.options.score;
    const C sum = C(scores<C>(score, z_, padded_, e_));
    const C dot = C(sum_over<C>(padded_, [=, this](int64_t i) { return load<C>(g_ + i) * (load<C>(e_ + i) / sum); }));
    for (int64_t i = 0; i < padded_; i += kLanes<C>)
      store<C>(grad_z_ + i,
               load<C>(grad_z_ + i) + score_slope<C>(score, load<C>(z_ + i)) * ((load<C>(g_ + i) - dot) / sum));
  }

  void write_row(int64_t t) {
    if (p_.options.softcap != 0)
      for (int64_t i = 0; i < padded_; i += kLanes<C>)
        store<C>(grad_z_ + i, load<C>(grad_z_ + i) * load<C>(slope_ + i));
    store_row<C>(p_.grad_logits, t, p_.experts, grad_z_);
  }

  const RouteBackwardParams& p_;
  const C* expert_scale_;
  const int64_t* tokens_of_segment_;
  double* grad_expert_scale_;
  int64_t padded_, padded_k_;
  Buffer<C> z_, slope_, e_;  // [E] capped logits, the cap's slope, exponentials or scores
  Buffer<C> g_, grad_z_;     // [E] gradient of the probabilities, of z
  Buffer<int32_t> ids_;      // [K] the chosen experts in range
  Buffer<int64_t> slots_;    // [K] their slots
  int64_t count_ = 0;
  Buffer<double> z_k_, work_k_;  // [K] their logits, the slopes of their scores
  Buffer<double> s_k_, grad_k_;  // [K] their scores, the gradients of these
  Exponentials<C> softmax_{};
  C share_ = 0;
};

template <class C>
void route_backward_tokens(const RouteBackwardParams& p, int64_t begin, int64_t end, const int64_t* tokens_of_segment,
                           double* partial_scale) {
  RouterBackward<C> router(p, tokens_of_segment, partial_scale);
  for (int64_t t = begin; t < end; ++t) router.token(t);
}

inline void route_backward(const RouteBackwardParams& p, int64_t begin, int64_t end, const int64_t* tokens_of_segment,
                           double* partial_scale) {
  if (p.logits.dtype == Dtype::float64) route_backward_tokens<double>(p, begin, end, tokens_of_segment, partial_scale);
  else route_backward_tokens<float>(p, begin, end, tokens_of_segment, partial_scale);
}

}  // namespace moe::MOE_ISA
