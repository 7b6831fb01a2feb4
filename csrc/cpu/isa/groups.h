// Limits a token's choice to the experts of the best groups.
#pragma once

#include "cpu/isa/scores.h"
#include "cpu/isa/shortlist.h"

namespace moe::MOE_ISA {

// The largest and the second largest of each lane, of all that was added.
template <class Key>
struct TopTwo {
  Vec<Key> first, second;

  MOE_INLINE void add(const TopTwo& other) {
    const Vec<Key> smaller = first > other.first ? other.first : first;
    const Vec<Key> runner_up = second > other.second ? second : other.second;
    first = first > other.first ? first : other.first;
    second = smaller > runner_up ? smaller : runner_up;
  }
};

// Lane l takes what lanes l and l ^ step hold: of a where bit `step` of l is clear, of b where it is set.
template <int step, class Key, int... l>
MOE_INLINE TopTwo<Key> fold_lanes(const TopTwo<Key>& a, const TopTwo<Key>& b, std::integer_sequence<int, l...>) {
  constexpr int n = sizeof...(l);
  auto own = [](Vec<Key> x, Vec<Key> y) { return __builtin_shufflevector(x, y, (l & step ? n + l : l)...); };
  auto other = [](Vec<Key> x, Vec<Key> y) { return __builtin_shufflevector(x, y, (l & step ? n + l : l) ^ step...); };
  TopTwo<Key> folded{own(a.first, b.first), own(a.second, b.second)};
  folded.add({other(a.first, b.first), other(a.second, b.second)});
  return folded;
}

// Lane i of the result: the two largest of all lanes of rows[i], count rows.
template <int count, class Key>
MOE_INLINE TopTwo<Key> fold_rows(TopTwo<Key>* rows) {
  constexpr std::make_integer_sequence<int, kLanes<Key>> lanes;
  if constexpr (count > 1) {
    for (int i = 0; i < count / 2; ++i) rows[i] = fold_lanes<count / 2>(rows[i], rows[i + count / 2], lanes);
    return fold_rows<count / 2>(rows);
  } else {
    return rows[0];
  }
}

template <int step, class Key>
MOE_INLINE TopTwo<Key> fold_rest(TopTwo<Key> row) {
  if constexpr (step < kLanes<Key>) {
    constexpr std::make_integer_sequence<int, kLanes<Key>> lanes;
    return fold_rest<2 * step>(fold_lanes<step>(row, row, lanes));
  } else {
    return row;
  }
}

template <class C>
class Groups {
 public:
  using Key = Bits<C>;

  explicit Groups(const RouteParams& p)
      : p_(p),
        size_(p.experts / p.num_groups),
        padded_(Ranking<C>::padded(p.num_groups)),
        memory_(Ranking<C>::size(padded_)),
        kept_(padded_),
        best_(memory_, padded_) {
    for (int64_t g = 0; g < padded_; ++g) best_.keys()[g] = kNothing<C>;
  }

  // In steps, as the choice of experts: rank, choose, mask. keys [E] are those of the experts.
  void rank(const Key* keys) {
    for (int64_t g = 0; g < p_.num_groups; g += kBatch) {
      const auto ours = lane_numbers<Key>() < Key(p_.num_groups - g);
      const Vec<Key> batch = ours ? group_keys(keys, g) : broadcast(kNothing<C>);
      std::memcpy(best_.keys() + g, &batch, kBatch * sizeof(Key));
    }
  }

  // kept_ = -1 for the best groups, 0 for others.
  void choose() {
    if (padded_ <= kShortlist) {
      if (padded_ == kRowKeys) find_places<kRowKeys>(best_.keys(), &kept_[0]);
      else find_places<kShortlist>(best_.keys(), &kept_[0]);
      for (int64_t g = 0; g < padded_; g += kLanes<C>) store<Key>(kept_ + g, load<Key>(kept_ + g) < Key(p_.top_groups));
      return;
    }
    for (int64_t g = 0; g < padded_; ++g) kept_[g] = 0;
    best_.build();
    for (int64_t i = 0; i < p_.top_groups; ++i) kept_[best_.take()] = -1;
  }

  // The keys of the groups not kept become the key of -inf or of 0.
  void mask(Key* keys) const {
    const Vec<Key> masked = key_of<C>(broadcast(p_.group_mask == GroupMask::zero ? C(0) : kMinusInf<C>));
    for (int64_t g = 0; g < p_.num_groups; ++g)
      for (int64_t i = 0; i < size_; i += kLanes<C>) {
        const auto ours = lane_numbers<Key>() < Key(size_ - i);
        Key* to = keys + g * size_ + i;
        store<Key>(to, (ours & ~broadcast(kept_[g])) != 0 ? masked : load<Key>(to));
      }
  }

 private:
  static constexpr int kBatch = kLanes<C> < 8 ? kLanes<C> : 8;  // groups at a time

  // The keys of the scores of groups g .. g + kBatch, in the first lanes.
  MOE_INLINE Vec<Key> group_keys(const Key* keys, int64_t g) const {
    const TopTwo<Key> nothing{broadcast(kTaken<C>), broadcast(kTaken<C>)};
    TopTwo<Key> rows[kBatch];
    for (int row = 0; row < kBatch; ++row) {
      rows[row] = nothing;
      const Key* from = keys + (g + row) * size_;
      for (int64_t i = 0; g + row < p_.num_groups && i < size_; i += kLanes<C>) {
        const auto ours = lane_numbers<Key>() < Key(size_ - i);
        rows[row].add({ours ? load<Key>(from + i) : nothing.first, nothing.second});
      }
    }
    const TopTwo<Key> best = fold_rest<kBatch>(fold_rows<kBatch>(rows));
    if (p_.group_score == GroupScore::max || size_ == 1) return best.first;
    return key_of<C>(values_of<C>(best.first) + values_of<C>(best.second));
  }

  const RouteParams& p_;
  int64_t size_, padded_;
  Buffer<Key> memory_;
  Buffer<Key> kept_;  // [G]
  Ranking<C> best_;
};

}  // namespace moe::MOE_ISA
