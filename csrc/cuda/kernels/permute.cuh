// permute: each token's row is read once and written to all of its places; a row that no token has becomes zeros.
//
// Bound by memory: T rows must be read and R written. In the order of rows x would be read top_k times, by tokens whose
// rows lie far apart, so that beyond the size of L2 all of these reads come from memory; in the order of tokens a piece
// of x stays in registers while it is written to all its places. A place costs nothing for being scattered: it is
// written in runs of at least 32 accesses.
#pragma once

#include "cuda/arch/memory.cuh"
#include "cuda/arch/warp.cuh"
#include "cuda/kernels/dropped.cuh"
#include "cuda/kernels/math.cuh"
#include "cuda/kernels/turn.cuh"
#include "stages/params.h"

namespace moe {

inline constexpr int kPermuteThreads = 256;
inline constexpr int kPermuteInFlight = 4;  // accesses of one lane

// The bytes of a row that one warp moves: lane l takes accesses l, l + 32, ...
template <class Access>
struct PermutePiece {
  static constexpr int64_t kBytes = 32 * kPermuteInFlight * sizeof(Access);

  int64_t begin, row_bytes;

  __device__ __forceinline__ int64_t at(int i) const {
    return begin + (i * 32 + arch::lane_id()) * int64_t(sizeof(Access));
  }
  __device__ __forceinline__ void store(char* row, const Access (&values)[kPermuteInFlight]) const {
#pragma unroll
    for (int i = 0; i < kPermuteInFlight; ++i)
      if (at(i) < row_bytes) arch::store_global(row + at(i), values[i]);
  }
};

template <class Access>
__device__ __forceinline__ void permute_token(const PermuteParams& p, int64_t token,
                                              const PermutePiece<Access>& piece) {
  const char* x = static_cast<const char*>(p.x) + token * p.x_stride_bytes;
  Access values[kPermuteInFlight] = {};
#pragma unroll
  for (int i = 0; i < kPermuteInFlight; ++i)
    if (piece.at(i) < p.row_bytes) values[i] = arch::load_streamed<Access>(x + piece.at(i));

  // Each lane finds the row of one slot, the warp writes them in turn.
  for (int64_t k = 0; k < p.width; k += 32) {
    const int64_t slot = token * p.width + k + arch::lane_id();
    int32_t row = -1;
    if (k + arch::lane_id() < p.width) row = p.slot_row[slot];
    const bool found = row >= 0 && row < p.rows && p.row_slot[row] == slot;
    for (uint32_t left = arch::ballot(found); left; left &= left - 1) {
      const int64_t to = arch::shuffle(row, arch::lowest_bit(left));
      piece.store(static_cast<char*>(p.out) + to * p.row_bytes, values);
    }
  }
}

// Of the 32 rows from `first` on, those that no token has.
template <class Access>
__device__ __forceinline__ void clear_dropped(const PermuteParams& p, int64_t first,
                                              const PermutePiece<Access>& piece) {
  const Access zeros[kPermuteInFlight] = {};
  uint32_t left = dropped_rows(p.row_slot, p.slot_row, p.tokens * p.width, p.rows, first);
  for (; left; left &= left - 1)
    piece.store(static_cast<char*>(p.out) + (first + arch::lowest_bit(left)) * p.row_bytes, zeros);
}

// A warp takes a piece of one token's row, or the same piece of 32 rows to clear.
template <class Access>
__global__ void __launch_bounds__(kPermuteThreads) permute_kernel(const __grid_constant__ PermuteParams p) {
  take_turn();
  const int64_t pieces = ceil_div(p.row_bytes, PermutePiece<Access>::kBytes);
  const int64_t warp = (int64_t(blockIdx.x) * kPermuteThreads + threadIdx.x) / 32;
  const PermutePiece<Access> piece{warp % pieces * PermutePiece<Access>::kBytes, p.row_bytes};
  const int64_t item = warp / pieces;
  if (item < p.tokens) permute_token(p, item, piece);
  else clear_dropped(p, (item - p.tokens) * 32, piece);
}

template <class Access>
int64_t permute_blocks(const PermuteParams& p) {
  const int64_t pieces = ceil_div(p.row_bytes, PermutePiece<Access>::kBytes);
  const int64_t warps = (p.tokens + ceil_div(p.rows, 32)) * pieces;
  return ceil_div(warps * 32, kPermuteThreads);
}

}  // namespace moe
