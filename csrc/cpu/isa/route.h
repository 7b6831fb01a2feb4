// Logits to weights and experts, one token after another: scores, choice, weights, statistics.
#pragma once

#include <optional>

#include "cpu/isa/groups.h"

namespace moe::MOE_ISA {

// Where no bias and no group made the choice, the largest of all experts are chosen, and a renormalised softmax needs
// no other expert: what it is divided by cancels. eps is compared with a sum of at least 1 / E.
template <class C>
RouteOptions without_others(RouteOptions options, int64_t experts) {
  constexpr double kNegligible = sizeof(C) == 4 ? 0x1p-40 : 0x1p-60;
  if (options.score != Score::softmax || options.renormalize == Renormalize::none) return options;
  if (__builtin_fabs(options.eps) * double(experts) > kNegligible) return options;
  options.score = Score::softmax_selected;
  if (options.renormalize != Renormalize::pnorm) options.renormalize = Renormalize::none;  // the sum is 1
  return options;
}

// One token at a time, in steps: a caller takes each step for a few tokens, so that none waits for another's latency.
template <class C>
class Router {
 public:
  Router(const RouteParams& p, int32_t* counts, double* prob)
      : p_(p),
        bias_(static_cast<const C*>(p.selection_bias)),
        expert_scale_(static_cast<const C*>(p.expert_scale)),
        choice_is_on_scores_(bias_ || p.num_groups > 1),
        options_(choice_is_on_scores_ ? p.options : without_others<C>(p.options, p.experts)),
        counts_(counts),
        prob_(prob),
        padded_(Ranking<C>::padded(p.experts)),
        z_(padded_),
        e_(padded_),
        s_(padded_),
        padded_k_(round_to_lanes<C>(p.top_k)),
        z_k_(padded_k_),
        work_k_(padded_k_),
        s_k_(padded_k_),
        memory_(Ranking<C>::size(p.experts)),
        ranking_(memory_, p.experts),
        groups_(p) {
    for (int64_t k = 0; k < padded_k_; ++k) z_k_[k] = kMinusInf<C>;
  }

  void score(int64_t t) {
    token_ = t;
    chosen_ = p_.chosen + t * p_.top_k;
    load_row<C>(p_.logits, t, p_.experts, z_);
    if (!choice_is_on_scores_) set_keys([z = &z_[0]](int64_t i) { return load<C>(z + i); });
    if (options_.softcap != 0) apply_softcap<C>(z_, p_.experts, C(options_.softcap));

    if (options_.score == Score::softmax || counts_) softmax_ = exponentials<C>(z_, padded_, e_);
    if (scores_are_known()) sum_ = scores<C>(options_.score, z_, padded_, s_);
    if (choice_is_on_scores_) set_choice_keys();
  }

  // The limit to the best groups.
  void rank_groups() { groups_.rank(ranking_.keys()); }
  void choose_groups() { groups_.choose(); }
  void mask_groups() {
    Bits<C>* keys = ranking_.keys();
    groups_.mask(keys);
    shortlist_.fold(padded_, [=](int64_t i) { return load<Bits<C>>(keys + i); });
  }

  // The choice by shortlist ...
  void bound() { shortlist_.bound(p_.top_k); }
  void list() { shortlist_.list(ranking_.keys(), padded_); }
  bool place() { return shortlist_.place(); }
  void sort() {
    shortlist_.sort();
    for (int64_t k = 0; k < p_.top_k; ++k) chosen_[k] = int32_t(shortlist_.ids()[k]);
    if (keys_are_of_z()) {
      for (int64_t k = 0; k < padded_k_; k += kLanes<C>) {
        const Vec<C> z = values_of<C>(load<Bits<C>>(shortlist_.keys() + k));
        store<C>(z_k_ + k, lane_numbers<Bits<C>>() < Bits<C>(p_.top_k - k) ? z : broadcast(kMinusInf<C>));
      }
    } else {
      gather();
    }
  }

  // ... or by tournament.
  void begin_tournament() { ranking_.build(); }
  MOE_INLINE void choose(int64_t k) { chosen_[k] = int32_t(ranking_.take()); }

  void gather() {
    const C* from = scores_are_known() ? s_ : z_;
    C* z_k = z_k_;
    for (int64_t k = 0; k < p_.top_k; ++k) z_k[k] = from[chosen_[k]];
  }

  MOE_INLINE void score_chosen() {
    const Score score = scores_are_known() ? Score::identity : options_.score;
    chosen_scores<C>(score, z_k_, p_.top_k, softmax_, work_k_, s_k_);
  }

  // weights = scores of the chosen / denominator * scale * expert_scale
  void weigh() {
    const double by = denominator(options_, s_k_, p_.top_k), scale = options_.scale;
    C* weights = static_cast<C*>(p_.weights) + token_ * p_.top_k;
    for (int64_t k = 0; !expert_scale_ && k < p_.top_k; k += kLanes<double>) {
      const Vec<double> s = load<double>(s_k_ + k);
      store<double>(weights + k, (by == 1 ? s : s / by) * scale, p_.top_k - k);
    }
    for (int64_t k = 0; expert_scale_ && k < p_.top_k; ++k)
      weights[k] = C(s_k_[k] / by * (scale * double(expert_scale_[chosen_[k]])));
    if (counts_) add_statistics();
  }

 private:
  bool scores_are_known() const { return is_elementwise(options_.score) && (choice_is_on_scores_ || counts_); }

  bool keys_are_of_z() const {
    return !choice_is_on_scores_ && !counts_ && options_.softcap == 0 && options_.score != Score::identity;
  }

  template <class F>
  MOE_INLINE void set_keys(const F& choice) {
    Bits<C>* keys = ranking_.keys();
    shortlist_.fold(padded_, [=](int64_t i) {
      const Vec<Bits<C>> key = key_of<C>(choice(i));
      store<Bits<C>>(keys + i, key);
      return key;
    });
    ranking_.seal();
  }

  void set_choice_keys() {
    const Score score = options_.score;
    const C *from = is_elementwise(score) ? s_ : score == Score::softmax ? e_ : z_, *bias = bias_;
    const C sum = score == Score::softmax ? C(softmax_.sum) : C(1);
    const int64_t experts = p_.experts;
    set_keys([=](int64_t i) {
      Vec<C> c = load<C>(from + i);
      if (sum != 1) c = c / sum;
      if (bias) c = c + load<C>(bias + i, experts - i);
      // The score of padding's -inf may be 0, which would bound the list above negative choices.
      return lane_numbers<Bits<C>>() < Bits<C>(experts - i) ? c : broadcast(kMinusInf<C>);
    });
  }

  void add_statistics() {
    static_cast<C*>(p_.logsumexp)[token_] = log_sum_exp<C>(softmax_, z_, p_.experts);
    const int64_t segment = p_.segments ? p_.segments[token_] : 0;
    if (segment < 0 || segment >= p_.num_segments) return;

    int32_t* counts = counts_ + segment * p_.experts;
    for (int64_t k = 0; k < p_.top_k; ++k) ++counts[chosen_[k]];

    const bool elementwise = is_elementwise(options_.score);
    const C* of = elementwise ? s_ : e_;
    const double share = 1 / (elementwise ? sum_ : softmax_.sum);
    double* prob = prob_ + segment * p_.experts;
    for (int64_t i = 0; i < p_.experts; ++i) prob[i] += double(of[i]) * share;
  }

  const RouteParams& p_;
  const C* bias_;
  const C* expert_scale_;
  bool choice_is_on_scores_;  // otherwise the logits are compared: no rounding of a score makes a tie of them
  RouteOptions options_;
  int32_t* counts_;
  double* prob_;
  int64_t padded_;
  Buffer<C> z_, e_, s_;  // [E] logits, their exponentials, elementwise scores
  int64_t padded_k_;
  Buffer<C> z_k_, work_k_;  // [K] logits, exponentials or scores of the chosen
  Buffer<double> s_k_;      // [K] their scores
  Buffer<Bits<C>> memory_;
  Ranking<C> ranking_;
  Shortlist<C> shortlist_;
  Groups<C> groups_;

  // Of the token in work.
  int64_t token_ = 0;
  int32_t* chosen_ = nullptr;  // [K]
  Exponentials<C> softmax_{};
  double sum_ = 0;  // of the elementwise scores
};

template <class C>
void route_tokens(const RouteParams& p, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob) {
  constexpr int64_t kTogether = 4;
  std::optional<Router<C>> routers[kTogether];
  // Beyond 2048 experts their working memory leaves the cache.
  const int64_t together = p.experts > 2048 ? 1 : end - begin < kTogether ? end - begin : kTogether;
  for (int64_t i = 0; i < together; ++i) routers[i].emplace(p, partial_counts, partial_prob);

  for (; begin < end; begin += together) {
    const int64_t count = min(end - begin, together);
    auto each = [&](auto step) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) step(*routers[i], i);
    };
    bool listed = p.top_k <= kMostOfShortlist;
    each([&](Router<C>& router, int64_t i) { router.score(begin + i); });
    if (p.num_groups > 1) {
      each([](Router<C>& router, int64_t) { router.rank_groups(); });
      each([](Router<C>& router, int64_t) { router.choose_groups(); });
      each([](Router<C>& router, int64_t) { router.mask_groups(); });
    }
    if (listed && p.top_k > 0) {
      each([](Router<C>& router, int64_t) { router.bound(); });
      each([](Router<C>& router, int64_t) { router.list(); });
      each([&](Router<C>& router, int64_t) { listed = router.place() && listed; });
      if (listed) each([](Router<C>& router, int64_t) { router.sort(); });
    }
    if (!listed) {
      each([](Router<C>& router, int64_t) { router.begin_tournament(); });
      for (int64_t k = 0; k < p.top_k; ++k) each([k](Router<C>& router, int64_t) { router.choose(k); });
      each([](Router<C>& router, int64_t) { router.gather(); });
    }
    each([](Router<C>& router, int64_t) { router.score_chosen(); });
    each([](Router<C>& router, int64_t) { router.weigh(); });
  }
}

inline void route(const RouteParams& p, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob) {
  if (p.logits.dtype == Dtype::float64) route_tokens<double>(p, begin, end, partial_counts, partial_prob);
  else route_tokens<float>(p, begin, end, partial_counts, partial_prob);
}

}  // namespace moe::MOE_ISA
