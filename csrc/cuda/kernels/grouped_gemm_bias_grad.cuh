// The bias gradient: the rows of each expert added up. Bound by reading them, once.
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/gathered_rows.cuh"
#include "cuda/kernels/offsets.cuh"
#include "cuda/kernels/turn.cuh"
#include "cuda/kernels/values.cuh"

namespace moe {

// A block has one line of columns and all rows of an expert: thread (group, lane) has 16 bytes of every kGroups-th row.
inline constexpr int kBiasGradThreads = 256;
inline constexpr int kBiasGradLanes = 8;
inline constexpr int kBiasGradGroups = kBiasGradThreads / kBiasGradLanes;
template <class T>
inline constexpr int kBiasGradVector = 16 / sizeof(T);
template <class T>
inline constexpr int kBiasGradCols = kBiasGradLanes * kBiasGradVector<T>;

// Value v of a lane is [v * kBiasGradLanes + lane] of its group; padded so that a store meets every bank once.
template <class T>
struct BiasGradShared {
  double sums[kBiasGradGroups][kBiasGradCols<T> + kBiasGradLanes];
};

struct BiasGradLaunch {
  BiasGradParams p;
  int64_t col_blocks;
  bool aligned;  // rows may be read 16 bytes at a time
};

// The rows first, first + step, ... below end: each 16 summed in float32, those sums in float64, so that errors do not
// grow with the number of rows.
template <class T>
__device__ void sum_rows(const BiasGradLaunch& at, int64_t first, int64_t end, int64_t col,
                         double (&sum)[kBiasGradVector<T>]) {
  constexpr int kVector = kBiasGradVector<T>, kInFlight = 4, kRowsOfPart = 16;
  const GatheredRows& grad = at.p.grad;
  for (int64_t begin = first; begin < end; begin += kRowsOfPart * kBiasGradGroups) {
    float part[kVector] = {};
#pragma unroll 1
    for (int i = 0; i < kRowsOfPart; i += kInFlight) {
      arch::Pack<T, kVector> rows[kInFlight];
      float scale[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        const int64_t row = begin + (i + j) * kBiasGradGroups, slot = row < end ? slot_of(grad, row) : 0;
        rows[j] = load_values<T, kVector>(row_at<T>(grad, slot) + col, row < end ? at.p.n - col : 0, at.aligned);
        scale[j] = row < end ? scale_at(grad, slot) : 0;
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
#pragma unroll
        for (int v = 0; v < kVector; ++v) part[v] += to_float(rows[j][v]) * scale[j];
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) sum[v] += double(part[v]);
  }
}

template <class T>
__global__ void __launch_bounds__(kBiasGradThreads, 2)
    grouped_gemm_bias_grad_kernel(const __grid_constant__ BiasGradLaunch at) {
  take_turn();
  constexpr int kVector = kBiasGradVector<T>, kCols = kBiasGradCols<T>;
  auto& shared = arch::shared<BiasGradShared<T>>();
  const int64_t expert = blockIdx.x / at.col_blocks, col_begin = blockIdx.x % at.col_blocks * kCols;
  const int group = int(threadIdx.x) / kBiasGradLanes, lane = int(threadIdx.x) % kBiasGradLanes;
  const RowRange rows = rows_of_expert(at.p.offsets, expert, at.p.num_rows);

  double sum[kVector] = {};
  const int64_t first_col = col_begin + lane * kVector;
  if (first_col < at.p.n) sum_rows<T>(at, rows.begin + group, rows.end, first_col, sum);

#pragma unroll
  for (int v = 0; v < kVector; ++v) shared.sums[group][v * kBiasGradLanes + lane] = sum[v];
  arch::sync_block();  // every group's sums are there
  const int64_t col = first_col + group;
  if (group >= kVector || col >= at.p.n) return;
  double total = 0;
  for (int g = 0; g < kBiasGradGroups; ++g) total += shared.sums[g][threadIdx.x];
  write(at.p.out, at.p.out_dtype, expert * at.p.n + col, float(total));
}

}  // namespace moe
