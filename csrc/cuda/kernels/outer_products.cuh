// What a block has summed up of a tile of grad^T . a [kGradCols, kGradCols], rows of grad and a added step by step: on
// tensor cores, floats rounded to TF32, or in float32.
#pragma once

#include <type_traits>

#include "cuda/arch/mma.cuh"
#include "cuda/kernels/float_sums.cuh"
#include "cuda/kernels/row_loader.cuh"

namespace moe {

// 16 columns of a tile by the rows from r on that one mma takes, 8 or 16: a fragment of the first operand, or two of
// the second, in which the upper rows of a fragment come before its other columns.
template <class T>
__device__ __forceinline__ void load_columns(uint32_t (&out)[4], GradTile<T>& tile, int r, int col, bool second) {
  const int lane = arch::lane_id();
  if constexpr (sizeof(T) == 2) {
    const int row = lane % 8 + (second ? lane / 8 % 2 : lane / 16) * 8, chunk = second ? lane / 16 : lane / 8 % 2;
    arch::load_matrix_x4_transposed(out, tile.at(r + row, col / 8 + chunk));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 + (second ? i % 2 : i / 2) * 4, n = lane / 4 + (second ? i / 2 : i % 2) * 8;
      out[i] = arch::to_tf32(tile.at(r + row, (col + n) / 4)[n % 4]);
    }
  }
}

// Four warps, each a quarter of the tile: 64 x 64.
template <class T>
class TensorCoreProducts {
 public:
  static constexpr int kThreads = 128, kBlocks = 2;

  // What the warps write down, half a quarter at a time, to store it in whole lines; padded so that the fragments'
  // rows meet every bank once.
  struct Staging {
    float values[4][32][72];
  };

  __device__ __forceinline__ void add(GradTile<T>& grad, GradTile<T>& a) {
#pragma unroll
    for (int r = 0; r < kGradDepth<T>; r += 32 / int(sizeof(T))) {
      uint32_t left[4][4], right[4][4];  // [16 of n, rows] and twice [8 of k, rows]
#pragma unroll
      for (int i = 0; i < 4; ++i) load_columns(left[i], grad, r, 64 * warp_n() + 16 * i, false);
#pragma unroll
      for (int j = 0; j < 4; ++j) load_columns(right[j], a, r, 64 * warp_k() + 16 * j, true);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          if constexpr (sizeof(T) == 2) arch::mma_16x8x16<T>(sums_[i][j], left[i], pair);
          else arch::mma_16x8x8_tf32(sums_[i][j], left[i], pair);
        }
    }
  }

  // Four neighbours of a row of the tile go to put(row, col, values). No warp may still read the steps whose place the
  // staging takes.
  template <class Put>
  __device__ __forceinline__ void write(Staging& staging, const Put& put) {
    const int lane = arch::lane_id(), warp = int(threadIdx.x) / 32;
    auto& rows = staging.values[warp];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i)  // fragment i % 2, its rows below 8 or from 8 on
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float* sums = sums_[2 * half + i / 2][j] + i % 2 * 2;
          arch::store(&rows[8 * i + lane / 4][8 * j + lane % 4 * 2], arch::Pack<float, 2>{{sums[0], sums[1]}});
        }
      arch::sync_warp();  // the rows are there
#pragma unroll 4
      for (int row = lane / 16; row < 32; row += 2) {
        const int col = lane % 16 * 4;
        put(64 * warp_n() + 32 * half + row, 64 * warp_k() + col, arch::load<Quad>(&rows[row][col]));
      }
      arch::sync_warp();  // and read
    }
  }

 private:
  __device__ static int warp_n() { return int(threadIdx.x) / 64; }
  __device__ static int warp_k() { return int(threadIdx.x) / 32 % 2; }

  float sums_[4][8][4] = {};
};

// 16 x 16 threads, each two by two squares of four, so that a warp reads whole lines. A float32 sum of many terms loses
// bits: every kStepsOfPart steps are summed apart.
class FloatProducts {
 public:
  static constexpr int kThreads = 256, kBlocks = 1;
  struct Staging {};

  __device__ __forceinline__ void add(GradTile<float>& grad, GradTile<float>& a) {
#pragma unroll
    for (int r = 0; r < kGradDepth<float>; ++r) {
      Quad left[2], right[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        left[half] = arch::load<Quad>(grad.at(r, (64 * half + thread_n()) / 4));
        right[half] = arch::load<Quad>(a.at(r, (64 * half + thread_k()) / 4));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums_.part[i][j] += left[i / 4][i % 4] * right[j / 4][j % 4];
    }
    sums_.end_step();
  }

  template <class Put>
  __device__ __forceinline__ void write(Staging&, const Put& put) {
    sums_.add_part();
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* sums = sums_.sums[i] + 4 * half;
        put(64 * (i / 4) + thread_n() + i % 4, 64 * half + thread_k(), Quad{{sums[0], sums[1], sums[2], sums[3]}});
      }
  }

 private:
  // A warp has 4 x 8 threads: the fewest lines.
  __device__ static int thread_n() { return 4 * (int(threadIdx.x) / 64 * 4 + int(threadIdx.x) / 8 % 4); }
  __device__ static int thread_k() { return 4 * (int(threadIdx.x) / 32 % 2 * 8 + int(threadIdx.x) % 8); }

  FloatSums<16> sums_;
};

template <class T, bool tensor_cores>
using OuterProducts = std::conditional_t<tensor_cores, TensorCoreProducts<T>, FloatProducts>;

}  // namespace moe
