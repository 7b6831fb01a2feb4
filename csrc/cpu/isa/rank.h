// Exact selection of the largest values, one after another, ties to the lowest index: a tournament whose nodes are
// vectors. Values are compared as integers whose order is: -inf .. -0 == +0 .. +inf, NaN.
#pragma once

#include <limits>

#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

template <class C>
inline constexpr Bits<C> kTaken = std::numeric_limits<Bits<C>>::min();  // below the key of -inf

inline constexpr int kRowKeys = 16;  // keys lie in rows of so many, whole vectors in every instruction set

template <class C>
MOE_INLINE Vec<Bits<C>> key_of(Vec<C> x) {
  constexpr Bits<C> kMax = std::numeric_limits<Bits<C>>::max();
#ifdef __AVX512F__
  // A digit for each class of values, from the right: both kinds of NaN become kMax, zeros +0, others stay.
  constexpr int kTable = 0x11111800;
  if constexpr (sizeof(C) == 4) {
    const __m512i max = _mm512_set1_epi32(kMax), table = _mm512_set1_epi32(kTable);
    x = bit_cast<Vec<C>>(_mm512_fixupimm_ps(bit_cast<__m512>(max), bit_cast<__m512>(x), table, 0));
  } else {
    const __m512i max = _mm512_set1_epi64(kMax), table = _mm512_set1_epi64(kTable);
    x = bit_cast<Vec<C>>(_mm512_fixupimm_pd(bit_cast<__m512d>(max), bit_cast<__m512d>(x), table, 0));
  }
#else
  x = x + C(0);  // turns -0 into +0
  x = x == x ? x : bit_cast<Vec<C>>(broadcast(kMax));
#endif
  const auto bits = bit_cast<Vec<Bits<C>>>(x);
  return bits ^ (bits >> (8 * sizeof(C) - 1) & kMax);
}

// The values keys were made of; NaN for NaN, +0 for -0.
template <class C>
MOE_INLINE Vec<C> values_of(Vec<Bits<C>> keys) {
  return bit_cast<Vec<C>>(keys ^ (keys >> (8 * sizeof(C) - 1) & std::numeric_limits<Bits<C>>::max()));
}

// Halves the vector to 16 bytes and then turns it around itself, so that no step but the last leaves the vector unit.
template <class T, int n, int... i>
MOE_INLINE T max_of(Vec<T, n> v, std::integer_sequence<int, i...>) {
  if constexpr (n * sizeof(T) > 16) {
    Vec<T, n / 2> low = __builtin_shufflevector(v, v, i...);
    Vec<T, n / 2> high = __builtin_shufflevector(v, v, (n / 2 + i)...);
    return max_of<T, n / 2>(low > high ? low : high, std::make_integer_sequence<int, n / 4>());
  } else if constexpr (n == 4) {
    Vec<T, n> other = __builtin_shufflevector(v, v, 2, 3, 0, 1);
    v = v > other ? v : other;
    other = __builtin_shufflevector(v, v, 1, 0, 3, 2);
    return (v > other ? v : other)[0];
  } else {
    Vec<T, n> other = __builtin_shufflevector(v, v, 1, 0);
    return (v > other ? v : other)[0];
  }
}

template <class T>
MOE_INLINE T max_of(Vec<T> v) {
  return max_of<T, kLanes<T>>(v, std::make_integer_sequence<int, kLanes<T> / 2>());
}

// The first lane that holds x; one must.
template <class T>
MOE_INLINE int first_equal(Vec<T> v, T x) {
#if defined(__AVX512F__)
  auto bits = bit_cast<__m512i>(v);
  if constexpr (sizeof(T) == 4) return __builtin_ctz(_mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(x)));
  else return __builtin_ctz(_mm512_cmpeq_epi64_mask(bits, _mm512_set1_epi64(x)));
#elif defined(__AVX2__)
  return __builtin_ctz(_mm256_movemask_epi8(bit_cast<__m256i>(v == x))) / int(sizeof(T));
#else
  int lane = 0;
  while (v[lane] != x) ++lane;
  return lane;
#endif
}

template <class T>
MOE_INLINE Vec<T> lane_numbers() {
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}

// Level 0 holds the keys; entry i of the level above is the largest key of vector i; the top level is one vector.
template <class C>
class Ranking {
 public:
  using Key = Bits<C>;
  static constexpr int64_t kWidth = kLanes<C>;

  static int64_t padded(int64_t count) { return ceil_div(count, kRowKeys) * kRowKeys; }

  // Keys that the levels of `count` values take.
  static int64_t size(int64_t count) {
    int64_t total = padded(count);
    for (count = ceil_div(count, kWidth); count > 1; total += count * kWidth) count = ceil_div(count, kWidth);
    return total;
  }

  Ranking(Key* memory, int64_t count) : count_(count) {
    for (int64_t i = size(count) - 1; i >= 0; --i) memory[i] = kTaken<C>;
    level_[0] = memory;
    memory += padded(count);
    for (count = ceil_div(count, kWidth); count > 1; memory += count * kWidth) {
      count = ceil_div(count, kWidth);
      level_[++top_] = memory;
    }
  }

  // [padded(count)]; to be filled and sealed before anything is chosen.
  Key* keys() { return level_[0]; }

  // Makes the padding the smallest keys.
  MOE_INLINE void seal() {
    for (int64_t i = count_ / kWidth * kWidth; i < padded(count_); i += kWidth)
      store<Key>(level_[0] + i,
                 lane_numbers<Key>() < Key(count_ - i) ? load<Key>(level_[0] + i) : broadcast(kTaken<C>));
  }

  void build() {
    int64_t vectors = ceil_div(count_, kWidth);
    for (int level = 0; level < top_; ++level, vectors = ceil_div(vectors, kWidth))
      for (int64_t i = 0; i < vectors; ++i) level_[level + 1][i] = max_of<Key>(load<Key>(level_[level] + i * kWidth));
    best_ = max_of<Key>(load<Key>(level_[top_]));
  }

  // Removes the largest key and returns its index. At most `count` calls after a build().
  MOE_INLINE int64_t take() {
    int64_t index = 0;
    for (int level = top_; level >= 0; --level)
      index = index * kWidth + first_equal<Key>(load<Key>(level_[level] + index * kWidth), best_);

    best_ = kTaken<C>;  // then the largest of each vector on the way up
    uint64_t i = index;
    for (int level = 0; level <= top_; ++level, i /= kWidth) {
      // Whole vectors are stored, because the next load of a whole vector would wait for a smaller store.
      Key* node = level_[level] + i / kWidth * kWidth;
      Vec<Key> v = lane_numbers<Key>() == Key(i % kWidth) ? broadcast(best_) : load<Key>(node);
      store<Key>(node, v);
      best_ = max_of<Key>(v);
    }
    return index;
  }

 private:
  Key* level_[32];
  int top_ = 0;
  int64_t count_;
  Key best_ = kTaken<C>;
};

}  // namespace moe::MOE_ISA
