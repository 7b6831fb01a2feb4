// Logits to weights and experts, as many tokens together as a vector has lanes: scores and keys of one token after
// another, then the choice and the weights of all, a token in each lane.
#pragma once

#include <optional>

#include "cpu/isa/groups.h"
#include "cpu/isa/largest.h"

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

template <class C>
class Router {
 public:
  static constexpr int kTokens = kLanes<C>;

  Router(const RouteParams& p, int64_t tokens, int32_t* counts, double* prob)
      : p_(p),
        expert_scale_(static_cast<const C*>(p.expert_scale)),
        choice_is_on_scores_(p.selection_bias || p.num_groups > 1),
        listed_(sizeof(C) == 4 && p.top_k <= Largest::kMost && p.experts <= Largest::kMostKeys),
        options_(choice_is_on_scores_ ? p.options : without_others<C>(p.options, p.experts)),
        counts_(counts),
        prob_(prob),
        padded_(Ranking<C>::padded(p.experts)),
        bias_(padded_),
        z_(padded_),
        e_(padded_),
        s_(padded_),
        stride_(Ranking<C>::size(p.experts)),
        rows_(listed_ && !choice_is_on_scores_ ? 1 : int(min(tokens, kTokens))),
        memory_(rows_ * stride_),
        groups_(p),
        largest_(padded_, p.top_k),
        z_k_(Ranking<C>::padded(p.top_k * kTokens)),
        weights_(p.top_k * kTokens) {
    for (int i = 0; i < rows_; ++i) rankings_[i].emplace(memory_ + i * stride_, p.experts);
    for (int64_t i = 0; i < p.top_k * kTokens; ++i) z_k_[i] = 0;
    const C* bias = static_cast<const C*>(p.selection_bias);
    for (int64_t e = 0; e < padded_; ++e) bias_[e] = bias && e < p.experts ? bias[e] : C(0);
  }

  // At most kTokens from token first on.
  void route(int64_t first, int count) {
    first_ = first;
    count_ = count;
    for (int i = 0; i < count; ++i) {
      fetch_row_ahead<C>(p_.logits, first + kTokens + i, p_.tokens, p_.experts);
      score(i);
    }
    if (p_.num_groups > 1) {
      groups_.choose(rankings_[0]->keys(), stride_, count);
      for (int i = 0; i < count; ++i) groups_.mask(rankings_[i]->keys(), i);
    }
    if (listed_) take_listed();
    else take_by_tournament();
    gather();
    score_chosen();
    weigh();
    for (int i = 0; counts_ && i < count; ++i) count_chosen(i);
  }

 private:
  int32_t* chosen(int i) const { return p_.chosen + (first_ + i) * p_.top_k; }

  void score(int i) {
    const bool list = listed_ && !choice_is_on_scores_, whole = p_.experts == padded_;
    const bool softmax = options_.score == Score::softmax;
    if (list && whole) visit_row<C>(p_.logits, first_ + i, [=, this](const auto* row) { list_row(i, row); });
    if (list && whole && !softmax && !counts_) return;
    load_row<C>(p_.logits, first_ + i, p_.experts, z_);
    if (list && !whole) list_row<C>(i, z_);
    if (!choice_is_on_scores_ && !listed_) set_logit_keys(i);
    if (options_.softcap != 0) apply_softcap<C>(z_, p_.experts, C(options_.softcap));
    if (softmax || counts_) {
      softmax_ = exponentials<C>(z_, padded_, e_);
      max_[i] = softmax_.max;
      share_[i] = 1 / softmax_.sum;
    }
    if (choice_is_on_scores_) set_choice_keys(i);
    if (counts_) add_probabilities(i);
  }

  template <class S>
  MOE_INLINE void list_row(int i, const S* row) {
    if constexpr (sizeof(C) == 4)
      largest_.add(i, [row](int64_t at, Words& lost) __attribute__((always_inline)) {
        const Vec<C> z = load<C>(row + at);
        lost |= bit_cast<Words>(z);
        return key_of<C>(z);
      });
  }

  MOE_INLINE void list_keys(int i) {
    if constexpr (sizeof(C) == 4)
      largest_.add(i, [keys = rankings_[i]->keys()](int64_t at, Words& lost) __attribute__((always_inline)) {
        const Words key = load<Word>(keys + at);
        lost |= key ^ key >> 31;
        return key;
      });
  }

  template <class F>
  MOE_INLINE void set_keys(int i, const F& choice) {
    Bits<C>* keys = rankings_[i]->keys();
    for (int64_t at = 0; at < padded_; at += kTokens) store<Bits<C>>(keys + at, key_of<C>(choice(at)));
    rankings_[i]->seal();
  }

  void set_logit_keys(int i) {
    set_keys(i, [z = &z_[0]](int64_t at) { return load<C>(z + at); });
  }

  void set_choice_keys(int i) {
    const Score score = options_.score;
    const C *from = score == Score::softmax ? e_ : z_, *bias = bias_;
    const C sum = score == Score::softmax ? C(softmax_.sum) : C(1);
    set_keys(i, [=](int64_t at) __attribute__((always_inline)) {
      Vec<C> c = score_of<C>(score, load<C>(from + at));
      if (sum != 1) c = c / sum;
      return c + load<C>(bias + at);
    });
  }

  void take_listed() {
    for (int i = 0; choice_is_on_scores_ && i < count_; ++i) list_keys(i);
    largest_.choose();
    store_rows<Word>(largest_.ids(), p_.top_k, count_, chosen(0));
    for (int i = 0; i < count_; ++i)
      if (!largest_.is_certain(i)) take_again(i);
  }

  void take_again(int i) {
    if (!choice_is_on_scores_) {
      load_row<C>(p_.logits, first_ + i, p_.experts, z_);
      set_logit_keys(0);
    }
    Ranking<C>& ranking = *rankings_[choice_is_on_scores_ ? i : 0];
    ranking.build();
    for (int64_t k = 0; k < p_.top_k; ++k) chosen(i)[k] = int32_t(ranking.take());
  }

  // One choice of each token in turn, so that none waits for another's latency.
  void take_by_tournament() {
    for (int i = 0; i < count_; ++i) rankings_[i]->build();
    for (int64_t k = 0; k < p_.top_k; ++k)
      for (int i = 0; i < count_; ++i) chosen(i)[k] = int32_t(rankings_[i]->take());
  }

  void gather() {
    for (int i = 0; i < count_; ++i) {
      const int32_t* ids = chosen(i);
      visit_row<C>(p_.logits, first_ + i, [=, this](const auto* row) {
        for (int64_t k = 0; k < p_.top_k; ++k) z_k_[k * kTokens + i] = to_scalar<C>(row[ids[k]]);
      });
      for (int64_t k = 0; expert_scale_ && k < p_.top_k; ++k) weights_[k * kTokens + i] = expert_scale_[ids[k]];
    }
    if (options_.softcap != 0) apply_softcap<C>(z_k_, p_.top_k * kTokens, C(options_.softcap));
  }

  // z_k_ = scores of the chosen, but for a factor share_.
  void score_chosen() {
    Vec<C>* z = reinterpret_cast<Vec<C>*>(&z_k_[0]);
    if (options_.score == Score::softmax) {
      for (int64_t k = 0; k < p_.top_k; ++k) z[k] = exp<C>(z[k] - load<C>(max_));
    } else if (options_.score == Score::softmax_selected) {
      Vec<C> max = broadcast(kMinusInf<C>);
      for (int64_t k = 0; k < p_.top_k; ++k) max = z[k] > max ? z[k] : max;
      for (int64_t k = 0; k < p_.top_k; ++k) z[k] = exp<C>(z[k] - max);
    } else {
      for (int64_t k = 0; k < p_.top_k; ++k) z[k] = score_of<C>(options_.score, z[k]);
    }
  }

  // From here on the few chosen scores are float64, so that a weight is rounded once.
  // weights = scores of the chosen / denominator * scale * expert_scale
  void weigh() {
    for (int part = 0; part < kTokens; part += kLanes<double>) {
      const C* z = z_k_ + part;
      Vec<double> share = broadcast(1.0);
      if (options_.score == Score::softmax) share = load<double>(share_ + part);
      if (options_.score == Score::softmax_selected) {
        Vec<double> sum{};
        for (int64_t k = 0; k < p_.top_k; ++k) sum += load<double>(z + k * kTokens);
        share = 1 / sum;
      }
      auto score = [=](int64_t k) __attribute__((always_inline)) { return load<double>(z + k * kTokens) * share; };
      const Vec<double> by = denominator(options_, p_.top_k, score);
      for (int64_t k = 0; k < p_.top_k; ++k) {
        Vec<double> w = score(k);
        if (options_.renormalize != Renormalize::none) w = w / by;
        C* to = weights_ + k * kTokens + part;
        store<double>(to, expert_scale_ ? w * (load<double>(to) * options_.scale) : w * options_.scale);
      }
    }
    C* weights = static_cast<C*>(p_.weights) + first_ * p_.top_k;
    store_rows<C>(weights_, p_.top_k, count_, weights);
  }

  void add_probabilities(int i) {
    const int64_t t = first_ + i;
    static_cast<C*>(p_.logsumexp)[t] = log_sum_exp<C>(softmax_, z_, p_.experts);
    const int64_t segment = p_.segments ? p_.segments[t] : 0;
    if (segment < 0 || segment >= p_.num_segments) return;
    const bool elementwise = is_elementwise(options_.score);
    const double sum = elementwise ? scores<C>(options_.score, z_, padded_, s_) : softmax_.sum;
    const C* of = elementwise ? s_ : e_;
    double* prob = prob_ + segment * p_.experts;
    for (int64_t e = 0; e < p_.experts; ++e) prob[e] += double(of[e]) * (1 / sum);
  }

  void count_chosen(int i) {
    const int64_t segment = p_.segments ? p_.segments[first_ + i] : 0;
    if (segment < 0 || segment >= p_.num_segments) return;
    int32_t* counts = counts_ + segment * p_.experts;
    for (int64_t k = 0; k < p_.top_k; ++k) ++counts[chosen(i)[k]];
  }

  const RouteParams& p_;
  const C* expert_scale_;
  bool choice_is_on_scores_;  // otherwise the logits are compared: no rounding of a score makes a tie of them
  bool listed_;               // otherwise a tournament chooses
  RouteOptions options_;
  int32_t* counts_;
  double* prob_;
  int64_t padded_;
  Buffer<C> bias_;       // [E]
  Buffer<C> z_, e_, s_;  // [E] logits, their exponentials, elementwise scores
  int64_t stride_;
  int rows_;
  Buffer<Bits<C>> memory_;  // [rows_, stride_] keys
  std::optional<Ranking<C>> rankings_[kTokens];
  Groups<C> groups_;
  Largest largest_;
  Buffer<C> z_k_;      // [K, kTokens] logits, exponentials or scores of the chosen
  Buffer<C> weights_;  // [K, kTokens] their expert scales, then their weights

  // Of the tokens in work.
  int64_t first_ = 0;
  int count_ = 0;
  C max_[kTokens];
  double share_[kTokens];
  Exponentials<C> softmax_{};
};

template <class C>
void route_tokens(const RouteParams& p, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob) {
  if (begin == end) return;
  Router<C> router(p, end - begin, partial_counts, partial_prob);
  for (; begin < end; begin += Router<C>::kTokens) router.route(begin, int(min(end - begin, Router<C>::kTokens)));
}

inline void route(const RouteParams& p, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob) {
  if (p.logits.dtype == Dtype::float64) route_tokens<double>(p, begin, end, partial_counts, partial_prob);
  else route_tokens<float>(p, begin, end, partial_counts, partial_prob);
}

}  // namespace moe::MOE_ISA
