// Sums of a wgmma to an expert's gradient, straight from registers, 16 bytes a lane: lanes of a quad, which share a
// row, first exchange what they have of each other's chunks.
#pragma once

#include "cuda/kernels/values.cuh"
#include "cuda/kernels/warp.cuh"

namespace moe {

// Where the sums [64, cols] of a warpgroup go: lane l of warp w has of row 16 w + l / 4 + 8 h columns 8 i + l % 4 * 2..
// in sums[4 i + 2 h..], as wgmma leaves them. Columns come in whole chunks of 16 bytes.
template <class S>
struct GradientRows {
  S* out;  // [rows, stride] from the tile's first element on
  int64_t stride, rows, cols;
  bool accumulate;

  template <int count>
  MOE_INLINE void store(const float (&sums)[count]) const {
    const int lane = arch::lane_id(), row = int(threadIdx.x) % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < count / 4; i += sizeof(S) == 4 ? 2 : 4) {
        if constexpr (sizeof(S) == 4) store_floats(row + 8 * half, i, sums + 4 * i + 2 * half);
        else store_rounded(row + 8 * half, i, sums + 4 * i + 2 * half);
      }
  }

 private:
  // Columns 8 i.. 8 i + 31.
  MOE_INLINE void store_rounded(int row, int i, const float* sums) const {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const arch::Pack<S, 2> pair{from_float<S>(sums[4 * j]), from_float<S>(sums[4 * j + 1])};
      __builtin_memcpy(&words[j], &pair, 4);
    }
    transpose_quad(words);
    put(row, 8 * (i + arch::lane_id() % 4), arch::Pack<uint32_t, 4>{words[0], words[1], words[2], words[3]});
  }

  // Columns 8 i.. 8 i + 15: even lanes get four of the first eight, odd ones of the others.
  MOE_INLINE void store_floats(int row, int i, const float* sums) const {
    const bool odd = arch::lane_id() % 2;
    const float first = arch::shuffle_xor(odd ? sums[0] : sums[4], 1);
    const float second = arch::shuffle_xor(odd ? sums[1] : sums[5], 1);
    const int col = 8 * (i + odd) + arch::lane_id() % 4 / 2 * 4;
    Quad values = odd ? Quad{first, second, sums[4], sums[5]} : Quad{sums[0], sums[1], first, second};
    if (accumulate && row < rows && col < cols) {
      const auto old = arch::load<Quad>(out + row * stride + col);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[j] += old[j];
    }
    put(row, col, values);
  }

  template <class P>
  MOE_INLINE void put(int row, int col, const P& pack) const {
    if (row < rows && col < cols) arch::store_global(out + row * stride + col, pack);
  }
};

}  // namespace moe
