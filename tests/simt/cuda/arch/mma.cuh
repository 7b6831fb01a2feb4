// Tensor cores of sm_80, written out: which lane holds which element (PTX ISA, "Matrix fragments").
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/arch/copy_async.cuh"

namespace moe::arch {

struct MatrixArgs {
  uint32_t* out;
  const unsigned char* row;
  simt::Where where;
};

// Register m of lane l holds row l / 4, columns 2 (l % 4) and the next, of matrix m; or of its transpose.
template <bool transposed>
void read_matrices(const simt::Lanes<MatrixArgs>& all) {
  uint16_t matrix[32][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const MatrixArgs& args = all[lane];
    if (!simt::Block::current->shared().holds(args.row, 16))
      simt::fail("load_matrix outside shared memory", args.where);
    simt::check_access("load_matrix", args.row, 16, 16, args.where);
    std::memcpy(matrix[lane], args.row, 16);
  }
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned m = 0; m < 4; ++m) {
      const unsigned i = lane / 4, j = lane % 4 * 2;
      const uint16_t low = transposed ? matrix[8 * m + j][i] : matrix[8 * m + i][j];
      const uint16_t high = transposed ? matrix[8 * m + j + 1][i] : matrix[8 * m + i][j + 1];
      all[lane].out[m] = low | uint32_t(high) << 16;
    }
}

inline void load_matrix_x4(uint32_t (&out)[4], const void* shared_row, simt::Where where = simt::Where::current()) {
  MatrixArgs args{out, static_cast<const unsigned char*>(shared_row), where};
  simt::Block::current->together("load_matrix_x4", 0xffffffff, args, read_matrices<false>, where);
}

inline void load_matrix_x4_transposed(uint32_t (&out)[4], const void* shared_row,
                                      simt::Where where = simt::Where::current()) {
  MatrixArgs args{out, static_cast<const unsigned char*>(shared_row), where};
  simt::Block::current->together("load_matrix_x4_transposed", 0xffffffff, args, read_matrices<true>, where);
}

struct MmaArgs {
  float* d;
  const uint32_t *a, *b;
};

// d [16, 8] += a [16, k] . b [8, k]^T, one float32 product after another.
template <int k>
void accumulate(const simt::Lanes<MmaArgs>& all, const float (&a)[16][k], const float (&b)[k][8]) {
  for (unsigned i = 0; i < 16; ++i) {
    float sum[8];
    for (unsigned j = 0; j < 8; ++j) sum[j] = all[i % 8 * 4 + j / 2].d[i / 8 * 2 + j % 2];
    for (int kk = 0; kk < k; ++kk)
      for (unsigned j = 0; j < 8; ++j) sum[j] += a[i][kk] * b[kk][j];
    for (unsigned j = 0; j < 8; ++j) all[i % 8 * 4 + j / 2].d[i / 8 * 2 + j % 2] = sum[j];
  }
}

template <class T>
void multiply_16x8x16(const simt::Lanes<MmaArgs>& all) {
  const auto element = [](uint32_t pair, int i) { return float(std::bit_cast<T>(uint16_t(pair >> 16 * i))); };
  float a[16][16], b[16][8];
  for (unsigned lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 2; ++i) {
      const unsigned row = lane / 4, column = lane % 4 * 2 + unsigned(i);
      for (unsigned r = 0; r < 4; ++r) a[row + r % 2 * 8][column + r / 2 * 8] = element(all[lane].a[r], i);
      for (unsigned r = 0; r < 2; ++r) b[column + r * 8][row] = element(all[lane].b[r], i);
    }
  accumulate<16>(all, a, b);
}

template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 simt::Where where = simt::Where::current()) {
  MmaArgs args{d, a, b};
  simt::Block::current->together("mma_16x8x16", 0xffffffff, args, multiply_16x8x16<T>, where);
}

// To the nearest of 10 fraction bits, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000) & 0xffffe000 : bits;
}

inline void multiply_16x8x8_tf32(const simt::Lanes<MmaArgs>& all) {
  const auto element = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000); };  // the rest is not read
  float a[16][8], b[8][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned row = lane / 4, column = lane % 4;
    for (unsigned r = 0; r < 4; ++r) a[row + r % 2 * 8][column + r / 2 * 4] = element(all[lane].a[r]);
    for (unsigned r = 0; r < 2; ++r) b[column + r * 4][row] = element(all[lane].b[r]);
  }
  accumulate<8>(all, a, b);
}

inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            simt::Where where = simt::Where::current()) {
  MmaArgs args{d, a, b};
  simt::Block::current->together("mma_16x8x8_tf32", 0xffffffff, args, multiply_16x8x8_tf32, where);
}

}  // namespace moe::arch
