// The few largest keys of several rows at once, in order, by sorting networks: no step depends on a value.
//   list  a row: each column of its vectors is sorted, and the best n of it are kept;
//   fold  the columns of two rows meet in one vector, then those of two pairs, until vector k holds the k-th largest of
//         every row, a row in each lane.
// What is sorted are words: a key whose lowest bits have made room for its index, so that no two are equal and of equal
// keys the one of the lower index is larger. Where keys that differ in those bits alone stand beside each other the
// order may be wrong; this is told, and the caller orders that row in another way. It is rare, as a key of 128 loses 7
// bits, and never happens to logits of bfloat16.
#pragma once

#include "cpu/isa/buffer.h"
#include "cpu/isa/rank.h"
#include "cpu/isa/transpose.h"

namespace moe::MOE_ISA {

using Word = int32_t;
using Words = Vec<Word>;

inline constexpr Word kNoWord = std::numeric_limits<Word>::min();

// a >= b in every lane.
MOE_INLINE void order(Words& a, Words& b) {
  const Words x = a, y = b;
  a = larger<Word>(x, y);
  b = smaller<Word>(x, y);
}

// Merges two sorted halves of v[0], v[step], .., n of them (Batcher's odd-even merge).
template <int n, int step>
MOE_INLINE void merge_halves(Words* v) {
  if constexpr (n == 2) {
    order(v[0], v[step]);
  } else {
    merge_halves<n / 2, 2 * step>(v);
    merge_halves<n / 2, 2 * step>(v + step);
#pragma GCC unroll 16
    for (int i = 1; i + 1 < n; i += 2) order(v[i * step], v[(i + 1) * step]);
  }
}

// v[0] >= v[1] >= .. in every lane.
template <int n>
MOE_INLINE void sort(Words* v) {
  if constexpr (n > 1) {
    sort<n / 2>(v);
    sort<n / 2>(v + n / 2);
    merge_halves<n, 1>(v);
  }
}

// The same, of v that rise and then fall or the other way round.
template <int n>
MOE_INLINE void sort_bitonic(Words* v) {
  if constexpr (n > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) order(v[i], v[i + n / 2]);
    sort_bitonic<n / 2>(v);
    sort_bitonic<n / 2>(v + n / 2);
  }
}

// Sorted words, and the largest of those that found no room.
template <int n>
struct Best {
  Words words[n], next;
};

// What is best of both, all sorted.
template <int n>
MOE_INLINE Best<n> merge(const Best<n>& a, const Best<n>& b) {
  Best<n> best;
  best.next = larger<Word>(a.next, b.next);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    best.words[i] = larger<Word>(a.words[i], b.words[n - 1 - i]);
    best.next = larger<Word>(best.next, smaller<Word>(a.words[i], b.words[n - 1 - i]));
  }
  sort_bitonic<n>(best.words);
  return best;
}

// Of rows `step` apart; lanes move as in transpose().
template <int step, int n>
MOE_INLINE Best<n> fold(const Best<n>& first, const Best<n>& second) {
  constexpr std::make_integer_sequence<int, kLanes<Word>> lanes;
  Best<n> a = first, b = second;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) unzip<Word, (step < 4)>(a.words[i], b.words[i], lanes);
  unzip<Word, (step < 4)>(a.next, b.next, lanes);
  return merge(a, b);
}

// The keys of a row of whole vectors: key(i) are those from i on. low: ones, as many as the indices have bits.
template <int n, class F>
MOE_INLINE Best<n> list(int64_t padded, Word low, const F& key) {
  Best<n> best, chunk;
  best.next = chunk.next = broadcast(kNoWord);
  Words ids = low - lane_numbers<Word>();
  for (int64_t begin = 0; begin < padded; begin += n * kLanes<Word>) {
#pragma GCC unroll 16
    for (int v = 0; v < n; ++v) {
      const int64_t i = begin + v * kLanes<Word>;
      chunk.words[v] = i < padded ? (key(i) & ~low) | ids : broadcast(kNoWord);
      ids -= kLanes<Word>;
    }
    sort<n>(chunk.words);
    best = begin == 0 ? chunk : merge(best, chunk);
  }
  return best;
}

class Largest {
 public:
  static constexpr int kRows = kLanes<Word>;
  static constexpr int64_t kMost = 16;           // to choose
  static constexpr int64_t kMostKeys = 1 << 16;  // an index leaves a key its sign, its exponent and 7 bits

  Largest(int64_t padded, int64_t count)
      : padded_(padded), count_(count), few_(count <= 8 ? kRows : 0), many_(count <= 8 ? 0 : kRows) {
    while (low_ < padded - 1) low_ = 2 * low_ + 1;
    if (count <= 8) std::memset(few_, 0, kRows * sizeof(Best<8>));
    else std::memset(many_, 0, kRows * sizeof(Best<16>));
  }

  // key(i, lost) also sets those bits in lost that, were they cut off, would make different keys equal.
  template <class F>
  MOE_INLINE void add(int row, const F& key) {
    Words lost{};
    auto noted = [&](int64_t i) __attribute__((always_inline)) { return key(i, lost); };
    if (count_ <= 8) few_[row] = list<8>(padded_, low_, noted);
    else many_[row] = list<16>(padded_, low_, noted);
    lost_[row] = lost;
  }

  // Rows that were not added have no result.
  void choose() {
    if (count_ <= 8) choose<8>(few_);
    else choose<16>(many_);
  }

  // [count, kRows] the indices of the largest.
  const Word* ids() const { return reinterpret_cast<const Word*>(ids_); }

  // False where keys beside each other, or the last of the chosen and the next, differ in lost bits alone, or may.
  bool is_certain(int row) const {
    if (!tied_[row]) return true;
    for (int i = 0; i < kRows; ++i)
      if (lost_[row][i] & low_) return false;
    return true;
  }

 private:
  template <int n, int step = 1>
  void choose(Best<n>* best) {
    if constexpr (step < kRows) {
      for (int row = 0; row < kRows; row += 2 * step) best[row] = fold<step>(best[row], best[row + step]);
      choose<n, 2 * step>(best);
    } else {
      tied_ = Words{};
      for (int64_t k = 0; k < count_; ++k) {
        const Words word = best->words[k], next = k + 1 < n ? best->words[k + 1] : best->next;
        ids_[k] = low_ - (word & low_);
        tied_ |= ((word ^ next) & ~low_) == 0;
      }
    }
  }

  int64_t padded_, count_;
  Word low_ = 1;
  Buffer<Best<8>> few_;    // [kRows]
  Buffer<Best<16>> many_;  // [kRows]
  Words ids_[kMost], lost_[kRows], tied_;
};

}  // namespace moe::MOE_ISA
