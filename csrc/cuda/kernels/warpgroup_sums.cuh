// The sums of a warpgroup as wgmma leaves them in registers, and rows of matrices in memory by eight columns a lane.
// wgmma leaves two neighbouring columns of a row to a lane; the four lanes of a row exchange them, so that each has
// eight and loads and stores 16 bytes.
#pragma once

#include <type_traits>

#include "cuda/arch/wgmma.cuh"
#include "cuda/kernels/math.cuh"
#include "cuda/kernels/warp.cuh"
#include "stages/params.h"

namespace moe {

using Eight = arch::Pack<float, 8>;
using RoundedEight = arch::Pack<uint32_t, 4>;  // of two bytes each

template <class T>
MOE_INLINE uint32_t rounded_pair(float low, float high) {
  return bits_as<uint32_t>(arch::Pack<T, 2>{from_float<T>(low), from_float<T>(high)});
}

template <class T>
MOE_INLINE RoundedEight rounded(const Eight& values) {
  RoundedEight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = rounded_pair<T>(values[2 * i], values[2 * i + 1]);
  return out;
}

template <class T>
MOE_INLINE Eight widened(const RoundedEight& words) {
  const auto values = bits_as<arch::Pack<T, 8>>(words);
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = to_float(values[i]);
  return out;
}

MOE_INLINE uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
MOE_INLINE uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

// Rows of a matrix, read and written in chunks of eight columns, of which n are there.
template <class T>
class ChunkRows {
 public:
  // `offset`: where a second run of columns begins.
  MOE_INLINE ChunkRows(const Matrix& matrix, int64_t offset = 0)
      : data_(static_cast<T*>(matrix.data)),
        stride_(matrix.stride),
        aligned_(reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && (matrix.stride | offset) % 8 == 0) {}

  MOE_INLINE explicit operator bool() const { return data_ != nullptr; }

  MOE_INLINE T* at(int64_t row, int64_t col) const { return data_ + row * stride_ + col; }

  MOE_INLINE RoundedEight load(const T* from, int n) const {
    if (aligned_ && n >= 8) return arch::load<RoundedEight>(from);
    RoundedEight out{};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < n) out[i / 2] |= uint32_t(bits_as<uint16_t>(from[i])) << i % 2 * 16;
    return out;
  }

  MOE_INLINE void store(T* to, const RoundedEight& words, int n) const {
    if (aligned_ && n >= 8) return arch::store_global(to, words);
    const auto values = bits_as<arch::Pack<T, 8>>(words);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < n) to[i] = values[i];
  }

 private:
  T* data_;
  int64_t stride_;
  bool aligned_;
};

// Of the four lanes of a row: pair i of lane q goes to pair q of lane i.
MOE_INLINE void exchange_pairs(RoundedEight& pairs) { transpose_quad(pairs.values); }
MOE_INLINE void exchange_pairs(Eight& pairs) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float of_pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_pairs[i] = pairs[2 * i + j];
    transpose_quad(of_pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[2 * i + j] = of_pairs[i];
  }
}

// The sums [64 * kBlocks, cols] of a warpgroup, as wgmma leaves them: a lane has two rows of each block, eight apart,
// and of groups of 32 columns four pairs of neighbours.
template <int blocks, int cols>
struct WarpgroupSums {
  static constexpr int kBlocks = blocks, kCols = cols, kRows = 2 * blocks, kGroups = cols / 32;

  float values[blocks][cols / 2];

  MOE_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < blocks; ++i)
#pragma unroll
      for (int j = 0; j < cols / 2; ++j) values[i][j] = 0;
  }

  MOE_INLINE void hold() {
#pragma unroll
    for (int i = 0; i < blocks; ++i) arch::wgmma_hold(values[i]);
  }

  // The lane's rows, among those of the warpgroup.
  static MOE_INLINE int row(int i) {
    return i / 2 * 64 + i % 2 * 8 + int(threadIdx.x) % 128 / 32 * 16 + arch::lane_id() / 4;
  }

  // Of row i: columns 8 j + 2 q and the next of a group, q being the lane's place among the four of a row.
  MOE_INLINE float2 pair(int i, int group, int j) const {
    const int at = 4 * (group * 4 + j) + i % 2 * 2;
    return {values[i / 2][at], values[i / 2][at + 1]};
  }
};

// f(std::integral_constant<int, index>), begin <= index < end, by branches, so that what uses the result is compiled
// once: registers have no run-time index, and to select from all of them would cost more than the rest of an epilogue.
template <int begin, int end, class F>
MOE_INLINE void with_index(int index, const F& f) {
  constexpr int middle = (begin + end) / 2;
  if constexpr (begin == middle) f(std::integral_constant<int, begin>());
  else if (index < middle) with_index<begin, middle>(index, f);
  else with_index<middle, end>(index, f);
}

// The biases of a group's pairs, added as sums are taken; `bias` points to this lane's first.
struct PairBiases {
  float2 pairs[4];

  MOE_INLINE PairBiases(const float* bias, int group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = arch::load<float2>(bias + 32 * group + 8 * i);
  }

  MOE_INLINE float2 add(int i, float2 pair) const { return {pair.x + pairs[i].x, pair.y + pairs[i].y}; }
};

// Eight sums of a lane as they lie, biases added.
template <class Sums>
MOE_INLINE Eight take(const Sums& sums, int row, int group, const float* bias) {
  const PairBiases biases(bias, group);
  Eight out;
  with_index<0, Sums::kRows * Sums::kGroups>(row * Sums::kGroups + group, [&](auto index) {
    constexpr int row = decltype(index)::value / Sums::kGroups, group = decltype(index)::value % Sums::kGroups;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = biases.add(j, sums.pair(row, group, j));
      out[2 * j] = pair.x, out[2 * j + 1] = pair.y;
    }
  });
  return out;
}

// Gates and ups of eight inner columns: pair i of one group and of another, or, interleaved, pairs of two groups side
// by side.
struct GatesUps {
  Eight gates, ups;
};

template <class Sums>
MOE_INLINE GatesUps take_gated(const Sums& sums, int row, int group, bool interleaved, const float* bias) {
  constexpr int groups = Sums::kGroups / 2, count = Sums::kRows * groups;
  const PairBiases first_biases(bias, interleaved ? 2 * group : group);
  const PairBiases second_biases(bias, interleaved ? 2 * group + 1 : groups + group);
  GatesUps out;
  with_index<0, 2 * count>((interleaved ? count : 0) + row * groups + group, [&](auto index) {
    constexpr int i = decltype(index)::value % count, row = i / groups, group = i % groups;
    constexpr bool mixed = decltype(index)::value >= count;
    constexpr int first = mixed ? 2 * group : group, second = mixed ? 2 * group + 1 : groups + group;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 a = first_biases.add(j, sums.pair(row, first, j));
      const float2 b = second_biases.add(j, sums.pair(row, second, j));
      if constexpr (mixed) {
        out.gates[j] = a.x, out.ups[j] = a.y, out.gates[4 + j] = b.x, out.ups[4 + j] = b.y;
      } else {
        out.gates[2 * j] = a.x, out.gates[2 * j + 1] = a.y, out.ups[2 * j] = b.x, out.ups[2 * j + 1] = b.y;
      }
    }
  });
  return out;
}

}  // namespace moe
