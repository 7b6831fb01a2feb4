// Tiles of operands in shared memory, and how a warp reads them.
#pragma once

#include "cuda/arch/mma.cuh"
#include "cuda/arch/warp.cuh"

namespace moe {

// [rows, cols] in chunks of 16 bytes. The chunks of a row are permuted so that 8 rows of one column of chunks, which
// one ldmatrix reads, lie in 32 different banks; where load_b_transposed reads value by value, 4 rows of two.
template <class T, int rows, int cols>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T);     // elements
  static constexpr int kRowChunks = cols / kChunk;  // a power of two
  static constexpr int kTurns = kRowChunks < 8 ? kRowChunks : 8;

  alignas(128) T values[rows * cols];

  __device__ __forceinline__ T* at(int row, int chunk) {
    const int turn = kRowChunks < 8 ? row * kRowChunks / 8 % kTurns : sizeof(T) == 4 ? row % 4 * 2 : row % kTurns;
    return values + (row * kRowChunks + (chunk ^ turn)) * kChunk;
  }
};

// What the tensor cores read of 4-byte elements.
template <class T>
__device__ __forceinline__ void round_fragment(uint32_t (&fragment)[4]) {
  if constexpr (sizeof(T) == 4)
#pragma unroll
    for (uint32_t& bits : fragment) {
      float x;
      __builtin_memcpy(&x, &bits, 4);
      bits = arch::to_tf32(x);
    }
}

// A fragment of the first operand of a warp's mma, 16 rows by 32 bytes of the reduction, from a tile [rows, depth].
template <class T, int rows, int depth>
__device__ __forceinline__ void load_a(uint32_t (&fragment)[4], SharedTile<T, rows, depth>& tile, int row, int k) {
  const int lane = arch::lane_id();
  arch::load_matrix_x4(fragment, tile.at(row + lane % 16, k / tile.kChunk + lane / 16));
  round_fragment<T>(fragment);
}

// Two fragments of the second, 8 columns each, columns col.. of the product, from a tile [cols, depth].
template <class T, int cols, int depth>
__device__ __forceinline__ void load_b(uint32_t (&fragments)[4], SharedTile<T, cols, depth>& tile, int col, int k) {
  const int lane = arch::lane_id();
  arch::load_matrix_x4(fragments, tile.at(col + lane / 16 * 8 + lane % 8, k / tile.kChunk + lane / 8 % 2));
  round_fragment<T>(fragments);
}

// The same from a tile [depth, cols].
template <class T, int depth, int cols>
__device__ __forceinline__ void load_b_transposed(uint32_t (&fragments)[4], SharedTile<T, depth, cols>& tile, int col,
                                                  int k) {
  const int lane = arch::lane_id();
  if constexpr (sizeof(T) == 2) {
    arch::load_matrix_x4_transposed(fragments, tile.at(k + lane % 16, col / tile.kChunk + lane / 16));
  } else {  // an element is wider than what ldmatrix transposes
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = col + i / 2 * 8 + lane / 4;
      __builtin_memcpy(&fragments[i], tile.at(k + i % 2 * 4 + lane % 4, n / 4) + n % 4, 4);
    }
    round_fragment<T>(fragments);
  }
}

}  // namespace moe
