// sm_90: fragments of a warp to shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/copy_async.cuh"

namespace moe::arch {

// Four 8x8 matrices of 2-byte elements, in registers as load_matrix_x4 leaves them; lane l names where row l % 8 of
// matrix l / 8 goes, 16 bytes, aligned to 16.
__device__ __forceinline__ void store_matrix_x4(void* shared_row, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void store_matrix_x4_transposed(void* shared_row, const uint32_t (&in)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
      "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
      : "memory");
}

}  // namespace moe::arch
