// Logits to weights and experts, one token after another: scores, choice, weights, statistics.
#pragma once

#include "cpu/isa/rank.h"
#include "cpu/isa/scores.h"

namespace moe::MOE_ISA {

// Limits the choice to the experts of the best groups.
template <class C>
class Groups {
 public:
  Groups(const RouteParams& p)
      : p_(p),
        size_(p.experts / p.num_groups),
        memory_(Ranking<C>::size(p.num_groups)),
        kept_(p.num_groups),
        best_(memory_, p.num_groups) {}

  // keys [E]: those of the groups not kept become the key of -inf or of 0.
  void mask(Bits<C>* keys) {
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      best_.keys()[g] = group_key(keys + g * size_);
      kept_[g] = false;
    }
    best_.build();
    for (int64_t i = 0; i < p_.top_groups; ++i) kept_[best_.take()] = true;
    const Bits<C> masked = key_of<C>(broadcast(p_.group_mask == GroupMask::zero ? C(0) : kMinusInf<C>))[0];
    for (int64_t g = 0; g < p_.num_groups; ++g)
      for (int64_t i = 0; !kept_[g] && i < size_; ++i) keys[g * size_ + i] = masked;
  }

 private:
  // The key of the largest choice of a group, or of the sum of the two largest.
  Bits<C> group_key(const Bits<C>* keys) const {
    Vec<Bits<C>> first = broadcast(kTaken<C>), second = first;
    for (int64_t i = 0; i < size_; i += kLanes<C>) {
      Vec<Bits<C>> v = load<Bits<C>>(keys + i, size_ - i);
      if (size_ - i < kLanes<C>) v = lane_numbers<Bits<C>>() < Bits<C>(size_ - i) ? v : broadcast(kTaken<C>);
      Vec<Bits<C>> smaller = first > v ? v : first;
      first = first > v ? first : v;
      second = second > smaller ? second : smaller;
    }
    Bits<C> largest = max_of<Bits<C>>(first);
    if (p_.group_score == GroupScore::max || size_ == 1) return largest;
    int lane = first_equal<Bits<C>>(first, largest);
    Vec<Bits<C>> others = lane_numbers<Bits<C>>() == Bits<C>(lane) ? second : first;
    C sum = value_of<C>(largest) + value_of<C>(max_of<Bits<C>>(others));
    return key_of<C>(broadcast(sum))[0];
  }

  const RouteParams& p_;
  int64_t size_;
  Buffer<Bits<C>> memory_;
  Buffer<bool> kept_;
  Ranking<C> best_;
};

template <class C>
class Router {
 public:
  Router(const RouteParams& p, int32_t* counts, double* prob)
      : p_(p),
        bias_(static_cast<const C*>(p.selection_bias)),
        expert_scale_(static_cast<const C*>(p.expert_scale)),
        counts_(counts),
        prob_(prob),
        padded_(round_to_lanes<C>(p.experts)),
        z_(padded_),
        e_(padded_),
        s_(padded_),
        z_k_(round_to_lanes<C>(p.top_k)),
        s_k_(p.top_k),
        memory_(Ranking<C>::size(p.experts)),
        ranking_(memory_, p.experts),
        groups_(p) {}

  // Begins a token: its scores and the ranking of its choices.
  void rank(int64_t t) {
    load_row<C>(p_.logits, t, p_.experts, z_);
    if (!choice_is_on_scores()) set_keys([&](int64_t i) { return load<C>(z_ + i); });
    if (p_.options.softcap != 0) apply_softcap<C>(z_, p_.experts, C(p_.options.softcap));

    const Score score = p_.options.score;
    if (score == Score::softmax || counts_) softmax_ = exponentials<C>(z_, padded_, e_);
    if (is_elementwise(score) && (choice_is_on_scores() || counts_)) sum_ = scores<C>(score, z_, padded_, s_);
    if (choice_is_on_scores()) set_choice_keys();

    ranking_.build();
  }

  MOE_INLINE void choose(int64_t t, int64_t k) { p_.chosen[t * p_.top_k + k] = int32_t(ranking_.take()); }

  void finish(int64_t t) {
    const int32_t* chosen = p_.chosen + t * p_.top_k;
    write_weights(chosen, static_cast<C*>(p_.weights) + t * p_.top_k);
    if (counts_) add_statistics(t, chosen);
  }

 private:
  // Otherwise the logits themselves are compared: no rounding of a score makes a tie of them.
  bool choice_is_on_scores() const { return bias_ || p_.num_groups > 1; }

  template <class F>
  MOE_INLINE void set_keys(F choice) {
    for (int64_t i = 0; i < p_.experts; i += kLanes<C>) store<Bits<C>>(ranking_.keys() + i, key_of<C>(choice(i)));
  }

  void set_choice_keys() {
    const Score score = p_.options.score;
    set_keys([&](int64_t i) {
      Vec<C> c = is_elementwise(score)     ? load<C>(s_ + i)
                 : score == Score::softmax ? load<C>(e_ + i) / C(softmax_.sum)
                                           : load<C>(z_ + i);
      return bias_ ? c + load<C>(bias_ + i, p_.experts - i) : c;
    });
    if (p_.num_groups > 1) groups_.mask(ranking_.keys());
  }

  // weights = scores of the chosen / denominator * scale * expert_scale
  void write_weights(const int32_t* chosen, C* weights) {
    const Score score = p_.options.score;
    const C* from = score == Score::softmax ? e_ : z_;
    for (int64_t k = 0; k < p_.top_k; ++k) z_k_[k] = from[chosen[k]];
    chosen_scores<C>(score, z_k_, p_.top_k, softmax_.sum, s_k_);
    const double by = denominator(p_.options, s_k_, p_.top_k);
    for (int64_t k = 0; k < p_.top_k; ++k) {
      double scale = expert_scale_ ? p_.options.scale * double(expert_scale_[chosen[k]]) : p_.options.scale;
      weights[k] = C(s_k_[k] / by * scale);
    }
  }

  void add_statistics(int64_t t, const int32_t* chosen) {
    static_cast<C*>(p_.logsumexp)[t] = log_sum_exp<C>(softmax_, z_, p_.experts);
    const int64_t segment = p_.segments ? p_.segments[t] : 0;
    if (segment < 0 || segment >= p_.num_segments) return;

    int32_t* counts = counts_ + segment * p_.experts;
    for (int64_t k = 0; k < p_.top_k; ++k) ++counts[chosen[k]];

    const bool elementwise = is_elementwise(p_.options.score);
    const C* of = elementwise ? s_ : e_;
    const double share = 1 / (elementwise ? sum_ : softmax_.sum);
    double* prob = prob_ + segment * p_.experts;
    for (int64_t i = 0; i < p_.experts; ++i) prob[i] += double(of[i]) * share;
  }

  const RouteParams& p_;
  const C* bias_;
  const C* expert_scale_;
  int32_t* counts_;
  double* prob_;
  int64_t padded_;
  Buffer<C> z_, e_, s_;  // [E] logits, their exponentials, elementwise scores
  Buffer<C> z_k_;        // [K] logits (or exponentials) of the chosen
  Buffer<double> s_k_;   // [K] their scores
  Buffer<Bits<C>> memory_;
  Ranking<C> ranking_;
  Groups<C> groups_;
  Exponentials<C> softmax_{};
  double sum_ = 0;  // of the elementwise scores
};

// Each choice of a token waits for the one before it, so a few tokens choose in turns.
template <class C>
void route_tokens(const RouteParams& p, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob) {
  Router<C> routers[]{{p, partial_counts, partial_prob},
                      {p, partial_counts, partial_prob},
                      {p, partial_counts, partial_prob},
                      {p, partial_counts, partial_prob}};
  const int64_t together = p.experts <= 2048 ? 4 : 1;  // beyond it their working memory leaves the cache
  for (; begin < end; begin += together) {
    const int64_t count = end - begin < together ? end - begin : together;
    for (int64_t i = 0; i < count; ++i) routers[i].rank(begin + i);
    for (int64_t k = 0; k < p.top_k; ++k)
      for (int64_t i = 0; i < count; ++i) routers[i].choose(begin + i, k);
    for (int64_t i = 0; i < count; ++i) routers[i].finish(begin + i);
  }
}

inline void route(const RouteParams& p, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob) {
  if (p.logits.dtype == Dtype::float64) route_tokens<double>(p, begin, end, partial_counts, partial_prob);
  else route_tokens<float>(p, begin, end, partial_counts, partial_prob);
}

}  // namespace moe::MOE_ISA
