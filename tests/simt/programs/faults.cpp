// Kernels with one planted fault each: `faults NAME` runs one, `faults NAME mended` the same kernel without its fault.
// Prints what it computed; ends with 1 and a message where the emulator or a comparison objects.
#include <cstdio>
#include <map>
#include <string>

#include "cuda/arch/copy_async.cuh"
#include "cuda/arch/launch.cuh"
#include "cuda/arch/memory.cuh"
#include "cuda/arch/mma.cuh"
#include "cuda/arch/warp.cuh"
#include "device.h"
#include "planted.h"

namespace faults {

using namespace moe;

constexpr int kThreads = 128;

struct FloatsShared {
  alignas(16) float values[kThreads];
};

// out[i] = in[i + 1], through shared memory.
template <bool mended>
__global__ void missing_barrier(const float* in, float* out) {
  auto& shared = arch::shared<FloatsShared>();
  shared.values[threadIdx.x] = in[threadIdx.x];
  if constexpr (mended) arch::sync_block();
  out[threadIdx.x] = shared.values[(threadIdx.x + 1) % kThreads];
}

// The same, through the shared memory of a lane's neighbour.
template <bool mended>
__global__ void missing_warp_barrier(const float* in, float* out) {
  auto& shared = arch::shared<FloatsShared>();
  const unsigned partner = threadIdx.x ^ 1;
  shared.values[partner] = in[(partner + 1) % kThreads];
  if constexpr (mended) arch::sync_warp();
  out[threadIdx.x] = shared.values[threadIdx.x];
}

// Shared memory is written anew while others still read it.
template <bool mended>
__global__ void missing_second_barrier(const float* in, float* out) {
  auto& shared = arch::shared<FloatsShared>();
  for (int round = 0; round < 2; ++round) {
    shared.values[threadIdx.x] = in[threadIdx.x] + float(round);
    arch::sync_block();
    if (round == 0) out[threadIdx.x] = shared.values[(threadIdx.x + 1) % kThreads];
    if constexpr (mended) arch::sync_block();
  }
}

// Half of a copy is waited for.
template <bool mended>
__global__ void missing_wait(const float* in, float* out) {
  auto& shared = arch::shared<FloatsShared>();
  for (unsigned half = 0; half < 2; ++half) {
    const unsigned at = 64 * half + 4 * threadIdx.x;
    if (threadIdx.x < 16) arch::copy_async_16(shared.values + at, in + at);
    arch::copy_async_commit();
  }
  arch::copy_async_wait<mended ? 0 : 1>();
  arch::sync_block();
  out[threadIdx.x] = shared.values[(threadIdx.x + 1) % kThreads];
}

template <bool mended>
__global__ void missing_commit(const float* in, float* out) {
  auto& shared = arch::shared<FloatsShared>();
  if (threadIdx.x < 32) arch::copy_async_16(shared.values + 4 * threadIdx.x, in + 4 * threadIdx.x);
  if constexpr (mended) arch::copy_async_commit();
  arch::copy_async_wait<0>();
  arch::sync_block();
  out[threadIdx.x] = shared.values[(threadIdx.x + 1) % kThreads];
}

template <bool mended>
__global__ void store_out_of_bounds(const float* in, float* out) {
  const unsigned at = threadIdx.x + !mended;
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
  if (at >= 1) out[at] = in[(at + 1) % kThreads];
}

template <bool mended>
__global__ void vector_out_of_bounds(const float* in, float* out) {
  using Four = arch::Pack<float, 4>;
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
  if (threadIdx.x < 32 + !mended) arch::load<Four>(in + 4 * threadIdx.x);
}

template <bool mended>
__global__ void unaligned_vector(const float* in, float* out) {
  using Four = arch::Pack<float, 4>;
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
  if (threadIdx.x == 0) arch::load<Four>(in + (mended ? 4 : 2));
}

template <bool mended>
__global__ void shared_out_of_bounds(const float* in, float* out) {
  auto& shared = arch::shared<FloatsShared>();
  shared.values[threadIdx.x] = in[threadIdx.x];
  float* values = shared.values;
  if (threadIdx.x == 7) values[mended ? 7 : kThreads] = in[7];
  arch::sync_block();
  out[threadIdx.x] = shared.values[(threadIdx.x + 1) % kThreads];
}

template <bool mended>
__global__ void too_little_shared_memory(const float* in, float* out) {
  struct Twice {
    FloatsShared one, two;
  };
  arch::shared<std::conditional_t<mended, FloatsShared, Twice>>();
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
}

template <bool mended>
__global__ void unwritten_output(const float* in, float* out) {
  if (mended || threadIdx.x != 5) out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
}

template <bool mended>
__global__ void divergent_barrier(const float* in, float* out) {
  if (mended || threadIdx.x % 64 < 32) arch::sync_block();
  if (!mended && threadIdx.x % 64 >= 32) arch::sync_block();
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
}

template <bool mended>
__global__ void divergent_shuffle(const float* in, float* out) {
  const float value = in[(threadIdx.x + 1) % kThreads];
  out[threadIdx.x] = value;
  if (mended || threadIdx.x % 2 == 0) arch::shuffle_xor(value, 2);
  if (!mended && threadIdx.x % 2 == 1) arch::shuffle_up(value, 2);
}

// Half of the block has gone when the rest wait for all.
template <bool mended>
__global__ void deadlock(const float* in, float* out) {
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
  if (!mended && threadIdx.x >= 64) return;
  arch::sync_block();
}

// Lane 31 takes no part in what the mask says it does.
template <bool mended>
__global__ void warp_deadlock(const float* in, float* out) {
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
  if (arch::lane_id() < 31) arch::sync_warp(mended ? 0x7fffffff : 0xffffffff);
}

template <bool mended>
__global__ void absent_lane(const float* in, float* out) {
  const float value = in[(threadIdx.x + 1) % kThreads];
  out[threadIdx.x] = value;
  if (arch::lane_id() < 16) arch::shuffle(value, mended ? 15 : 16, 0xffff);
}

template <bool mended>
__global__ void endless_wait(const float* in, float* out) {
  while (!mended && *out != 0.5f) simt::Block::current->spin(simt::Where::current());
  out[threadIdx.x] = in[(threadIdx.x + 1) % kThreads];
}

using Kernel = void (*)(const float*, float*);

void run(Kernel kernel) {
  Device device;
  auto* in = static_cast<float*>(device.scratch(kThreads * 4));
  auto* out = static_cast<float*>(device.scratch(kThreads * 4));
  for (int i = 0; i < kThreads; ++i) in[i] = float(i);
  launch({.grid = dim3(1), .block = dim3(kThreads), .shared_bytes = sizeof(FloatsShared)}, kernel, in, out);
  check(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < kThreads; ++i)
    if (out[i] != float((i + 1) % kThreads))
      throw std::runtime_error("wrong: out[" + std::to_string(i) + "] is " + std::to_string(out[i]));
  std::puts("right");
}

// d [16, 8] = a [16, 64] . b [8, 64]^T from shared memory, 16-byte chunks of a row swapped so that no bank is read
// twice.
struct SwizzledShared {
  alignas(16) __nv_bfloat16 a[16][64], b[16][64];
};

__device__ int swizzled(int row, int chunk) { return (chunk ^ row % 8) * 8; }

template <bool mended>
__global__ void wrong_swizzle(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d) {
  using Chunk = arch::Pack<__nv_bfloat16, 8>;
  auto& shared = arch::shared<SwizzledShared>();
  const int lane = arch::lane_id();
  for (int i = lane; i < 16 * 8; i += 32) {
    const int row = i / 8, chunk = i % 8;
    arch::store(&shared.a[row][swizzled(row, chunk)], arch::load<Chunk>(a + i * 8));
    arch::store(&shared.b[row][swizzled(row, chunk)], arch::load<Chunk>(b + i * 8));
  }
  arch::sync_warp();
  float sum[4] = {};
  for (int k = 0; k < 4; ++k) {
    uint32_t of_a[4], of_b[4];
    const int row = lane % 16, chunk = 2 * k + lane / 16;
    arch::load_matrix_x4(of_a, &shared.a[row][mended ? swizzled(row, chunk) : (chunk ^ row % 4) * 8]);
    arch::load_matrix_x4(of_b, &shared.b[row][swizzled(row, chunk)]);
    arch::mma_16x8x16<__nv_bfloat16>(sum, of_a, {of_b[0], of_b[2]});
  }
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

void run_swizzle(void (*kernel)(const __nv_bfloat16*, const __nv_bfloat16*, float*)) {
  Device device;
  auto* a = static_cast<__nv_bfloat16*>(device.scratch(16 * 64 * 2));
  auto* b = static_cast<__nv_bfloat16*>(device.scratch(16 * 64 * 2));
  auto* d = static_cast<float*>(device.scratch(16 * 8 * 4));
  for (int i = 0; i < 16 * 64; ++i) a[i] = float(i % 7 - 3), b[i] = float(i % 5 - 2);
  launch({.grid = dim3(1), .block = dim3(32), .shared_bytes = sizeof(SwizzledShared)}, kernel, a, b, d);
  check(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float sum = 0;
      for (int k = 0; k < 64; ++k) sum += float(a[i * 64 + k]) * float(b[j * 64 + k]);
      if (d[i * 8 + j] != sum)
        throw std::runtime_error("wrong: d[" + std::to_string(i) + "][" + std::to_string(j) + "]");
    }
  std::puts("right");
}

// The sum of the blocks' numbers; the emulator changes threads at barriers alone, so that the addition is atomic.
template <bool mended>
__global__ void unordered_sum(float* sum) {
  if (threadIdx.x != 0) return;
  if constexpr (mended) {
    if (blockIdx.x == 0)
      for (unsigned block = 0; block < gridDim.x; ++block) *sum += 1 / float(block + 1);
  } else {
    *sum += 1 / float(blockIdx.x + 1);
  }
}

void run_sum(void (*kernel)(float*)) {
  float sum = 0;
  launch({.grid = dim3(1000), .block = dim3(32)}, kernel, &sum);
  check(cudaStreamSynchronize(nullptr));
  std::printf("%a\n", double(sum));
}

}  // namespace faults

int main(int argc, char** argv) {
  using namespace faults;
  return run_planted(argc, argv, [](const std::string& name, bool mended) {
    const std::map<std::string, Kernel> kernels{
        {"missing_barrier", mended ? missing_barrier<true> : missing_barrier<false>},
        {"missing_warp_barrier", mended ? missing_warp_barrier<true> : missing_warp_barrier<false>},
        {"missing_second_barrier", mended ? missing_second_barrier<true> : missing_second_barrier<false>},
        {"missing_wait", mended ? missing_wait<true> : missing_wait<false>},
        {"missing_commit", mended ? missing_commit<true> : missing_commit<false>},
        {"store_out_of_bounds", mended ? store_out_of_bounds<true> : store_out_of_bounds<false>},
        {"vector_out_of_bounds", mended ? vector_out_of_bounds<true> : vector_out_of_bounds<false>},
        {"unaligned_vector", mended ? unaligned_vector<true> : unaligned_vector<false>},
        {"shared_out_of_bounds", mended ? shared_out_of_bounds<true> : shared_out_of_bounds<false>},
        {"too_little_shared_memory", mended ? too_little_shared_memory<true> : too_little_shared_memory<false>},
        {"unwritten_output", mended ? unwritten_output<true> : unwritten_output<false>},
        {"divergent_barrier", mended ? divergent_barrier<true> : divergent_barrier<false>},
        {"divergent_shuffle", mended ? divergent_shuffle<true> : divergent_shuffle<false>},
        {"deadlock", mended ? deadlock<true> : deadlock<false>},
        {"warp_deadlock", mended ? warp_deadlock<true> : warp_deadlock<false>},
        {"endless_wait", mended ? endless_wait<true> : endless_wait<false>},
        {"absent_lane", mended ? absent_lane<true> : absent_lane<false>},
    };
    if (name == "wrong_swizzle") {
      run_swizzle(mended ? wrong_swizzle<true> : wrong_swizzle<false>);
    } else if (name == "unordered_sum") {
      run_sum(mended ? unordered_sum<true> : unordered_sum<false>);
    } else {
      run(kernels.at(name));
    }
  });
}
