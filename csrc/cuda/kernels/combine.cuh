// combine: y[t] = sum over k, in order, of weights[t, k] * rows[slot_row[t, k]].
// combine_backward: grad_rows[r] = weights[slot] * grad_y[token], grad_weights[slot] = <grad_y[token], rows[r]>.
//
// Bound by memory. Forward, a warp keeps a piece of y in registers while the rows of its token pass, several of them in
// flight, so that rows are read once and y is written once. Backward, a warp takes a slot: the warps of one token run
// side by side and share its gradient through L1, and a dot product ends in one warp, in the same order at every run.
#pragma once

#include <type_traits>

#include "cuda/arch/memory.cuh"
#include "cuda/arch/warp.cuh"
#include "cuda/kernels/dropped.cuh"
#include "cuda/kernels/math.cuh"
#include "cuda/kernels/turn.cuh"
#include "cuda/kernels/warp.cuh"
#include "stages/params.h"

namespace moe {

inline constexpr int kCombineThreads = 256;
inline constexpr int kCombineRows = 4;  // in flight at a time

// Accesses of one lane to a row, of n elements each: 16 bytes, or one element.
template <int n>
inline constexpr int kCombineAccesses = n > 1 ? 2 : 4;
inline constexpr int kBackwardAccesses = 4;

// What an access brings, as it is kept until it is added up: by words, or nvcc for sm_90 gives every two-byte value a
// register of its own.
template <class Values>
using Words = std::conditional_t<sizeof(Values) % 4 == 0, arch::Pack<uint32_t, sizeof(Values) / 4>, Values>;

// A warp takes a piece of one token's y.
template <class T, int n>
__global__ void __launch_bounds__(kCombineThreads, 4) combine_kernel(const __grid_constant__ CombineParams p) {
  take_turn();
  using Values = arch::Pack<T, n>;
  constexpr int accesses = kCombineAccesses<n>, piece = 32 * n * accesses;
  const int64_t pieces = ceil_div(p.hidden, piece);
  const int64_t warp = (int64_t(blockIdx.x) * kCombineThreads + threadIdx.x) / 32;
  const int64_t token = warp / pieces, begin = warp % pieces * piece;
  if (token >= p.tokens) return;
  auto column = [&](int i) { return begin + (i * 32 + arch::lane_id()) * n; };

  float sum[accesses][n] = {};
  for (int64_t k = 0; k < p.width; k += 32) {
    // Each lane finds the row of one slot, the warp adds them in turn.
    const int64_t slot = token * p.width + k + arch::lane_id();
    int32_t row = -1;
    if (k + arch::lane_id() < p.width) row = p.slot_row[slot];
    const bool found = row >= 0 && row < p.num_rows;
    const float weight = found && p.weights.data ? read(p.weights, slot) : 1.0f;

    for (uint32_t left = arch::ballot(found); left;) {
      const int count = min(arch::count_bits(left), kCombineRows);
      Words<Values> words[kCombineRows][accesses] = {};
      float scale[kCombineRows];
#pragma unroll
      for (int r = 0; r < kCombineRows; ++r) {
        if (r >= count) continue;
        const int source = arch::lowest_bit(left);
        left &= left - 1;
        scale[r] = arch::shuffle(weight, source);
        const T* from = static_cast<const T*>(p.rows.data) + arch::shuffle(row, source) * p.rows.stride;
#pragma unroll
        for (int i = 0; i < accesses; ++i)
          if (column(i) < p.hidden) words[r][i] = arch::load_streamed<Words<Values>>(from + column(i));
      }
#pragma unroll
      for (int r = 0; r < kCombineRows; ++r) {
        if (r >= count) continue;
#pragma unroll
        for (int i = 0; i < accesses; ++i) {
          const auto values = bits_as<Values>(words[r][i]);
#pragma unroll
          for (int v = 0; v < n; ++v) sum[i][v] += scale[r] * to_float(values[v]);
        }
      }
    }
  }

  T* y = static_cast<T*>(p.y.data) + token * p.y.stride;
#pragma unroll
  for (int i = 0; i < accesses; ++i) {
    Values out;
#pragma unroll
    for (int v = 0; v < n; ++v) out[v] = from_float<T>(sum[i][v]);
    if (column(i) < p.hidden) arch::store_global(y + column(i), out);
  }
}

template <class T, int n>
int64_t combine_blocks(const CombineParams& p) {
  constexpr int piece = 32 * n * kCombineAccesses<n>;
  return ceil_div(p.tokens * ceil_div(p.hidden, piece) * 32, kCombineThreads);
}

template <class T, int n>
__device__ __forceinline__ void clear_dropped(const CombineBackwardParams& p, int64_t first) {
  uint32_t left = dropped_rows(p.row_slot, p.slot_row, p.tokens * p.width, p.num_rows, first);
  for (; left; left &= left - 1) {
    T* to = static_cast<T*>(p.grad_rows.data) + (first + arch::lowest_bit(left)) * p.grad_rows.stride;
#pragma unroll 4
    for (int64_t column = arch::lane_id() * n; column < p.hidden; column += 32 * n)
      arch::store_global(to + column, arch::Pack<T, n>{});
  }
}

// A warp takes a slot, or 32 rows to clear. `rows`: grad_rows is wanted; `dot`: grad_weights is.
template <class T, int n, bool rows, bool dot>
__global__ void __launch_bounds__(kCombineThreads)
    combine_backward_kernel(const __grid_constant__ CombineBackwardParams p) {
  take_turn();
  using Values = arch::Pack<T, n>;
  constexpr int accesses = kBackwardAccesses;
  const int64_t slots = p.tokens * p.width;
  const int64_t slot = (int64_t(blockIdx.x) * kCombineThreads + threadIdx.x) / 32;
  if (slot >= slots) {
    if constexpr (rows) clear_dropped<T, n>(p, (slot - slots) * 32);
    return;
  }
  const int64_t row = p.slot_row[slot];
  const bool found = row >= 0 && row < p.num_rows && p.row_slot[row] == slot;

  float sum[accesses] = {};
  if (found) {
    const float weight = rows && p.weights.data ? read(p.weights, slot) : 1.0f;
    const T* grad_y = static_cast<const T*>(p.grad_y.data) + slot / p.width * p.grad_y.stride;
    const T* from = dot ? static_cast<const T*>(p.rows.data) + row * p.rows.stride : nullptr;
    T* to = rows ? static_cast<T*>(p.grad_rows.data) + row * p.grad_rows.stride : nullptr;
    for (int64_t begin = arch::lane_id() * n; begin < p.hidden; begin += 32 * n * accesses) {
      Words<Values> grad_words[accesses] = {}, other_words[accesses] = {};
#pragma unroll
      for (int i = 0; i < accesses; ++i) {
        const int64_t column = begin + i * 32 * n;
        if (column >= p.hidden) continue;
        grad_words[i] = arch::load<Words<Values>>(grad_y + column);
        if constexpr (dot) other_words[i] = arch::load_streamed<Words<Values>>(from + column);
      }
#pragma unroll
      for (int i = 0; i < accesses; ++i) {
        const int64_t column = begin + i * 32 * n;
        if (column >= p.hidden) continue;
        const auto grad = bits_as<Values>(grad_words[i]), other = bits_as<Values>(other_words[i]);
        Values scaled;
#pragma unroll
        for (int v = 0; v < n; ++v) {
          scaled[v] = from_float<T>(weight * to_float(grad[v]));
          if constexpr (dot) sum[i] += to_float(grad[v]) * to_float(other[v]);
        }
        if constexpr (rows) arch::store_global(to + column, scaled);
      }
    }
  }

  if constexpr (dot) {
    const float product = sum_of_warp((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (arch::lane_id() == 0) write(p.grad_weights, p.weights.dtype, slot, product);
  }
}

inline int64_t combine_backward_blocks(const CombineBackwardParams& p) {
  const int64_t warps = p.tokens * p.width + (p.grad_rows ? ceil_div(p.num_rows, 32) : 0);
  return ceil_div(warps * 32, kCombineThreads);
}

}  // namespace moe
