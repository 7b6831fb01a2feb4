// The part of CUDA that kernels and launches write themselves, for a host compiler; what an instruction does is in
// cuda/arch, who runs when in machine/.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};

// Of the thread that runs: one grid runs at a time, and in it one thread at a time.
inline dim3 gridDim, blockDim;
inline uint3 blockIdx, threadIdx;

namespace simt {
void finish_grids();  // machine/grid.h
}

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };

// What is in the stream and no grid begins behind the grids ahead of it.
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  simt::finish_grids();
  if (bytes) std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyDefault };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  simt::finish_grids();
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  simt::finish_grids();
  return cudaSuccess;
}

using std::max;
using std::min;
