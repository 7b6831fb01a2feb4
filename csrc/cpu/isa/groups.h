// Limits the choices of tokens to the experts of the best groups, as many tokens at once as a vector has lanes.
#pragma once

#include "cpu/isa/scores.h"
#include "cpu/isa/transpose.h"

namespace moe::MOE_ISA {

// The largest and the second largest of each lane.
template <class Key>
struct TopTwo {
  Vec<Key> first, second;
};

template <class Key>
MOE_INLINE TopTwo<Key> merge(const TopTwo<Key>& a, const TopTwo<Key>& b) {
  return {larger<Key>(a.first, b.first), larger<Key>(larger<Key>(a.second, b.second), smaller<Key>(a.first, b.first))};
}

// Of rows row .. row + rows: a row in each lane once rows are as many as lanes. of(row) is a row's own.
template <int rows, class Key, class F>
MOE_INLINE TopTwo<Key> fold_rows(int row, const F& of) {
  if constexpr (rows == 1) {
    return of(row);
  } else {
    constexpr std::make_integer_sequence<int, kLanes<Key>> lanes;
    constexpr bool within = rows / 2 < 16 / int(sizeof(Key));
    TopTwo<Key> a = fold_rows<rows / 2, Key>(row, of), b = fold_rows<rows / 2, Key>(row + rows / 2, of);
    unzip<Key, within>(a.first, b.first, lanes);
    unzip<Key, within>(a.second, b.second, lanes);
    return merge(a, b);
  }
}

template <class C>
class Groups {
 public:
  using Key = Bits<C>;
  static constexpr int kTokens = kLanes<C>;

  explicit Groups(const RouteParams& p)
      : p_(p),
        size_(p.experts / p.num_groups),
        keys_(p.num_groups * kTokens),
        places_(p.num_groups * kTokens),
        memory_(Ranking<C>::size(p.num_groups)),
        ranking_(memory_, p.num_groups) {}

  // keys [tokens, stride]: those of the experts, a row for each token.
  void choose(const Key* keys, int64_t stride, int tokens) {
    for (int64_t g = 0; g < p_.num_groups; ++g)
      store<Key>(keys_ + g * kTokens, group_keys(keys + g * size_, stride, tokens));
    if (p_.num_groups * p_.num_groups <= kPairs * p_.top_groups) place_by_comparing();
    else
      for (int i = 0; i < tokens; ++i) place_by_tournament(i);
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
  static constexpr int64_t kPairs = 1024;  // of groups compared in the time of one taken from a tournament, measured

  // Of all tokens at once.
  void place_by_comparing() {
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

  void place_by_tournament(int token) {
    for (int64_t g = 0; g < p_.num_groups; ++g) {
      ranking_.keys()[g] = keys_[g * kTokens + token];
      places_[g * kTokens + token] = Key(p_.top_groups);
    }
    ranking_.build();
    for (int64_t i = 0; i < p_.top_groups; ++i) places_[ranking_.take() * kTokens + token] = Key(i);
  }

  // The keys of the score of one group of each token.
  MOE_INLINE Vec<Key> group_keys(const Key* keys, int64_t stride, int tokens) const {
    const TopTwo<Key> best = fold_rows<kTokens, Key>(0, [=, this](int token) __attribute__((always_inline)) {
      const Key* from = keys + min(token, tokens - 1) * stride;
      const Vec<Key> nothing = broadcast(kTaken<C>);
      auto part = [=, this](int64_t i) __attribute__((always_inline)) {
        return lane_numbers<Key>() < Key(size_ - i) ? load<Key>(from + i) : nothing;
      };
      TopTwo<Key> row{part(0), nothing};
      for (int64_t i = kLanes<C>; i < size_; i += kLanes<C>) row = merge<Key>(row, {part(i), nothing});
      return row;
    });
    if (p_.group_score == GroupScore::max || size_ == 1) return best.first;
    return key_of<C>(values_of<C>(best.first) + values_of<C>(best.second));
  }

  const RouteParams& p_;
  int64_t size_;
  Buffer<Key> keys_, places_;  // [G, kTokens]: how many groups stand before each
  Buffer<Key> memory_;
  Ranking<C> ranking_;  // of one token's groups
};

}  // namespace moe::MOE_ISA
