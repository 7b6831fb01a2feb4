// The few largest keys of a row, exactly and in order, where no step waits for the one before it as in a tournament and
// no branch depends on the values:
//   fold   the row to 16 columns, the maxima of its strides;
//   bound  the count-th largest of them: the count-th largest key is no smaller;
//   list   the keys from the bound on, about 11 where 8 are wanted, of however many;
//   place  each counts those that stand before it;
//   sort   by place.
// The steps are apart so that a caller can take each for a few rows in turn, which hides their latencies.
#pragma once

#include "cpu/isa/rank.h"

namespace moe::MOE_ISA {

inline constexpr int kShortlist = 2 * kRowKeys;  // keys at most; a longer list is left to the tournament
inline constexpr int64_t kMostOfShortlist = 12;  // to choose: of more, too many rows would have a longer list

// Bit i: lane i of v is at least x.
template <class T>
MOE_INLINE uint32_t lanes_from(Vec<T> v, T x) {
#if defined(__AVX512F__)
  auto bits = bit_cast<__m512i>(v);
  if constexpr (sizeof(T) == 4) return _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(x));
  else return _mm512_cmpge_epi64_mask(bits, _mm512_set1_epi64(x));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(bit_cast<__m256>(v >= x));
  else return _mm256_movemask_pd(bit_cast<__m256d>(v >= x));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= uint32_t(v[i] >= x) << i;
  return bits;
#endif
}

// The lanes whose bits are set, moved to the front; the others hold anything.
template <class T>
MOE_INLINE Vec<T> compress(Vec<T> v, uint32_t lanes) {
#if defined(__AVX512F__)
  auto bits = bit_cast<__m512i>(v);
  if constexpr (sizeof(T) == 4) return bit_cast<Vec<T>>(_mm512_maskz_compress_epi32(lanes, bits));
  else return bit_cast<Vec<T>>(_mm512_maskz_compress_epi64(lanes, bits));
#elif defined(__AVX2__)
  // The numbers 0..7 of the vector's 32-bit parts, a byte each, of which those of the set lanes are kept.
  constexpr uint64_t kOfLane = sizeof(T) == 4 ? 0xff : 0xffff;
  const uint64_t kept = _pdep_u64(lanes, ~uint64_t(0) / kOfLane) * kOfLane;
  const auto parts = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(_pext_u64(0x0706050403020100, kept)));
  return bit_cast<Vec<T>>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(v), parts));
#else
  int count = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    v[count] = v[i];
    count += lanes >> i & 1;
  }
  return v;
#endif
}

template <class C>
inline constexpr Bits<C> kNothing = kTaken<C> + 1;  // below the key of -inf, and find_places can subtract 1

// How many of keys [count] stand before each: larger ones, and equal ones of a lower index.
template <int count, class Key>
MOE_INLINE void find_places(const Key* keys, Key* places) {
  constexpr int lanes = kLanes<Key>, vectors = count / lanes;
  Vec<Key> own[vectors], place[vectors]{};
  for (int v = 0; v < vectors; ++v) own[v] = load<Key>(keys + v * lanes);
#pragma GCC unroll 32
  for (int other = 0; other < count; ++other)
    for (int v = 0; v < vectors; ++v)  // a comparison that holds is -1
      place[v] -= broadcast(keys[other]) > own[v] + (lane_numbers<Key>() + Key(v * lanes) > Key(other));
  for (int v = 0; v < vectors; ++v) store<Key>(places + v * lanes, place[v]);
}

template <class C>
class Shortlist {
 public:
  using Key = Bits<C>;

  // key(i) is that of the values from i on. Padding may be folded as if its values were -inf: a bound need not be
  // tight.
  template <class F>
  MOE_INLINE void fold(int64_t padded, const F& key) {
    Vec<Key> largest[kVectors];
    for (auto& v : largest) v = broadcast(kNothing<C>);
    for (int64_t i = 0; i < padded; i += kRowKeys)
      for (int v = 0; v < kVectors; ++v) {
        const Vec<Key> next = key(i + v * kWidth);
        largest[v] = next > largest[v] ? next : largest[v];
      }
    for (int v = 0; v < kVectors; ++v) store<Key>(keys_ + v * kWidth, largest[v]);
  }

  // 1 <= count <= kMostOfShortlist.
  MOE_INLINE void bound(int64_t count) {
    find_places<kRowKeys>(keys_, places_);
    const Key last = count - 1;
    uint32_t from = 0, behind = 0;  // bits of the columns at this place or behind it, and behind it
    for (int v = 0; v < kVectors; ++v) {
      const Vec<Key> place = load<Key>(places_ + v * kWidth);
      from |= lanes_from<Key>(place, last) << v * kWidth;
      behind |= lanes_from<Key>(place, last + 1) << v * kWidth;
    }
    bound_ = keys_[__builtin_ctz(from ^ behind)];
  }

  // keys [padded], padding below those of any value.
  MOE_INLINE void list(const Key* keys, int64_t padded) {
    const Key bound = bound_;
    int length = 0;  // apart from the member, which the stores below might be to
    for (int64_t i = 0; i < padded && length <= kShortlist; i += kWidth) {
      const Vec<Key> key = load<Key>(keys + i);
      const uint32_t lanes = lanes_from<Key>(key, bound);
      store<Key>(keys_ + length, compress<Key>(key, lanes));
      store<Key>(ids_ + length, compress<Key>(lane_numbers<Key>() + Key(i), lanes));
      length += __builtin_popcount(lanes);
    }
    for (int i = 0; i < kRowKeys; i += kWidth) store<Key>(keys_ + length + i, broadcast(kNothing<C>));
    length_ = length;
  }

  // False where the list is too long.
  MOE_INLINE bool place() {
    if (length_ <= kRowKeys) find_places<kRowKeys>(keys_, places_);
    else if (length_ <= kShortlist) find_places<kShortlist>(keys_, places_);
    return length_ <= kShortlist;
  }

  MOE_INLINE void sort() {
    if (length_ <= kRowKeys) sort<kRowKeys>();
    else sort<kShortlist>();
  }

  // [kRowKeys] the keys and their indices in order; as many are right as were wanted.
  const Key* keys() const { return sorted_keys_; }
  const Key* ids() const { return sorted_ids_; }

 private:
  static constexpr int kWidth = kLanes<C>, kVectors = kRowKeys / kWidth;

  template <int size>
  MOE_INLINE void sort() {
    Vec<Key> keys[kVectors]{}, ids[kVectors]{};
#pragma GCC unroll 32
    for (int i = 0; i < size; ++i)
      for (int v = 0; v < kVectors; ++v) {
        const auto here = lane_numbers<Key>() + Key(v * kWidth) == broadcast(places_[i]);
        keys[v] = here ? broadcast(keys_[i]) : keys[v];
        ids[v] = here ? broadcast(ids_[i]) : ids[v];
      }
    for (int v = 0; v < kVectors; ++v) {
      store<Key>(sorted_keys_ + v * kWidth, keys[v]);
      store<Key>(sorted_ids_ + v * kWidth, ids[v]);
    }
  }

  // A vector may be stored behind the last key that still fits.
  alignas(64) Key keys_[kShortlist + 2 * kRowKeys];
  alignas(64) Key ids_[kShortlist + 2 * kRowKeys]{};
  alignas(64) Key places_[kShortlist];
  alignas(64) Key sorted_keys_[kRowKeys], sorted_ids_[kRowKeys];
  Key bound_;
  int length_;
};

}  // namespace moe::MOE_ISA
