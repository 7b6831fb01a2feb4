// Limits the choices of tokens to the experts of the best groups, as many tokens at once as a vector has lanes.
#pragma once

#include "cpu/isa/scores.h"
#include "cpu/isa/transpose.h"

namespace moe::MOE_ISA {

// The largest and the second largest of each lane, of all that was added.
template <class Key>
struct TopTwo {
  Vec<Key> first, second;

  MOE_INLINE void add(const TopTwo& other) {
    second = larger<Key>(larger<Key>(second, other.second), smaller<Key>(first, other.first));
    first = larger<Key>(first, other.first);
  }
};

// Lane i of rows[0] becomes the two largest of all lanes of rows[i], a row for each lane.
template <int step, class Key>
MOE_INLINE void fold_rows(TopTwo<Key>* rows) {
  if constexpr (step < kLanes<Key>) {
    constexpr std::make_integer_sequence<int, kLanes<Key>> lanes;
    constexpr bool within = step < 16 / int(sizeof(Key));
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Key>; i += 2 * step) {
      unzip<Key, within>(rows[i].first, rows[i + step].first, lanes);
      unzip<Key, within>(rows[i].second, rows[i + step].second, lanes);
      rows[i].add(rows[i + step]);
    }
    fold_rows<2 * step>(rows);
  }
}

template <class C>
class Groups {
 public:
  using Key = Bits<C>;
  static constexpr int kTokens = kLanes<C>;

  explicit Groups(const RouteParams& p)
      : p_(p), size_(p.experts / p.num_groups), keys_(p.num_groups * kTokens), places_(p.num_groups * kTokens) {}

  // keys [tokens, stride]: those of the experts, a row for each token.
  void choose(const Key* keys, int64_t stride, int tokens) {
    for (int64_t g = 0; g < p_.num_groups; ++g) store<Key>(keys_ + g * kTokens, group_keys(keys + g * size_, stride, tokens));

    for (int64_t g = 0; g < p_.num_groups; ++g) {
      const Vec<Key> own = load<Key>(keys_ + g * kTokens);
      Vec<Key> place{};
      for (int64_t other = 0; other < g; ++other) {
        const auto behind = load<Key>(keys_ + other * kTokens) < own;  // a comparison that holds is -1
        place += 1 + behind;
        store<Key>(places_ + other * kTokens, load<Key>(places_ + other * kTokens) - behind);
      }
      store<Key>(places_ + g * kTokens, place);
    }
  }

  // The keys of a token's groups that were not chosen become the key of -inf or of 0.
  void mask(Key* keys, int token) const {
    const Vec<Key> masked = key_of<C>(broadcast(p_.group_mask == GroupMask::zero ? C(0) : kMinusInf<C>));
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      const auto kept = broadcast(places_[g * kTokens + token]) < Key(p_.top_groups);
      for (int64_t i = 0; i < size_; i += kLanes<C>) {
        const auto ours = lane_numbers<Key>() < Key(size_ - i);
        Key* to = keys + g * size_ + i;
        store<Key>(to, (ours & ~kept) != 0 ? masked : load<Key>(to));
      }
    }
  }

 private:
  // The keys of the score of one group of each token.
  MOE_INLINE Vec<Key> group_keys(const Key* keys, int64_t stride, int tokens) const {
    const TopTwo<Key> nothing{broadcast(kTaken<C>), broadcast(kTaken<C>)};
    TopTwo<Key> rows[kTokens];
    for (int token = 0; token < kTokens; ++token, keys += token < tokens ? stride : 0) {
      rows[token] = nothing;
      for (int64_t i = 0; i < size_; i += kLanes<C>) {
        const auto ours = lane_numbers<Key>() < Key(size_ - i);
        rows[token].add({ours ? load<Key>(keys + i) : nothing.first, nothing.second});
      }
    }
    fold_rows<1>(rows);
    if (p_.group_score == GroupScore::max || size_ == 1) return rows[0].first;
    return key_of<C>(values_of<C>(rows[0].first) + values_of<C>(rows[0].second));
  }

  const RouteParams& p_;
  int64_t size_;
  Buffer<Key> keys_, places_;  // [G, kTokens]: how many groups stand before each
};

}  // namespace moe::MOE_ISA
