// What a block has summed up of a tile of a . b^T, step by step of the reduction: on tensor cores for two-byte values,
// in float32 otherwise. An element's terms are added in order, whatever the tile.
#pragma once

#include <type_traits>

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/float_sums.cuh"
#include "cuda/kernels/gemm_config.h"
#include "cuda/kernels/shared_tile.cuh"

namespace moe {

// A warp's part of the products [kRows, kCols], in fragments of the tensor cores; float32 is rounded to
// TF32.
template <class T, class Config, bool k_major>
class WarpProducts {
 public:
  static constexpr GemmConfig config = Config::value;
  static constexpr int kRows = config.rows / config.warp_rows, kCols = config.cols / config.warp_cols;

  // += a . b of one step of the reduction.
  template <class A, class B>
  MOE_INLINE void multiply(A& a, B& b) {
#pragma unroll
    for (int k = 0; k < config.depth; k += kStep) {
      uint32_t rows[kRows / 16][4], cols[kCols / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) load_a(rows[i], a, first_row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kCols / 16; ++j) {
        if constexpr (k_major) load_b(cols[j], b, first_col() + 16 * j, k);
        else load_b_transposed(cols[j], b, first_col() + 16 * j, k);
      }
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
          const uint32_t pair[2] = {cols[j / 2][j % 2 * 2], cols[j / 2][j % 2 * 2 + 1]};
          if constexpr (sizeof(T) == 2) arch::mma_16x8x16<T>(values_[i][j], rows[i], pair);
          else arch::mma_16x8x8_tf32(values_[i][j], rows[i], pair);
        }
    }
  }

  MOE_INLINE void store(Products<config.rows, config.cols>& to, const float* bias) const {
    const int row = first_row() + arch::lane_id() / 4, col = first_col() + arch::lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const auto add = arch::load<float2>(bias + col + 8 * j);
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          arch::store(to.at(row + 16 * i + 8 * half, col + 8 * j),
                      float2{values_[i][j][2 * half] + add.x, values_[i][j][2 * half + 1] + add.y});
    }
  }

 private:
  static constexpr int kStep = 32 / sizeof(T);

  static MOE_INLINE int first_row() { return int(threadIdx.x) / 32 / config.warp_cols * kRows; }
  static MOE_INLINE int first_col() { return int(threadIdx.x) / 32 % config.warp_cols * kCols; }

  float values_[kRows / 16][kCols / 8][4] = {};
};

// A thread's part of the products in float32, [8, 8]; a warp's is [32, 64]. Four terms of eight rows stand in registers
// while columns stream by; lanes side by side read different banks.
template <class Config, bool k_major>
class ThreadProducts {
 public:
  static constexpr GemmConfig config = Config::value;
  static_assert(config.rows == 32 * config.warp_rows && config.cols == 64 * config.warp_cols);

  template <class A, class B>
  MOE_INLINE void multiply(A& a, B& b) {
#pragma unroll 1  // registers
    for (int chunk = 0; chunk < config.depth / 4; ++chunk) {
      Quad rows[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) rows[i] = arch::load<Quad>(a.at(first_row() + 4 * i, chunk));
      if constexpr (k_major) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const auto terms = arch::load<Quad>(b.at(col(j), chunk));
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < 8; ++i) sums_.part[i][j] += rows[i][k] * terms[k];
        }
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int j = 0; j < 8; j += 4) {
            const auto cols = arch::load<Quad>(b.at(4 * chunk + k, col(j) / 4));
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
              for (int n = 0; n < 4; ++n) sums_.part[i][j + n] += rows[i][k] * cols[n];
          }
      }
    }
    sums_.end_step();
  }

  MOE_INLINE void store(Products<config.rows, config.cols>& to, const float* bias) {
    sums_.add_part();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i) *to.at(first_row() + 4 * i, col(j)) = sums_.sums[i][j] + bias[col(j)];
  }

 private:
  static MOE_INLINE int first_row() { return int(threadIdx.x) / 32 / config.warp_cols * 32 + arch::lane_id() / 8; }
  static MOE_INLINE int col(int j) {
    const int lane = arch::lane_id() % 8, first = int(threadIdx.x) / 32 % config.warp_cols * 64;
    return first + (k_major ? lane + 8 * j : 4 * lane + j % 4 + j / 4 * 32);
  }

  FloatSums<256 / config.depth> sums_;
};

template <class T, class Config, bool k_major>
using InnerProducts =
    std::conditional_t<Config::value.tensor_cores, WarpProducts<T, Config, k_major>, ThreadProducts<Config, k_major>>;

}  // namespace moe
