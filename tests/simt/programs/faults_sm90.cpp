// Kernels of sm_90a with one planted fault each, as in faults.cpp: `faults_sm90 NAME [mended]`.
#include <cstdio>
#include <map>
#include <string>

#include "cuda/arch/cluster.cuh"
#include "cuda/arch/launch.cuh"
#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/memory.cuh"
#include "cuda/arch/named_barrier.cuh"
#include "cuda/arch/proxy.cuh"
#include "cuda/arch/registers.cuh"
#include "cuda/arch/tma.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/launch/tensor_map.h"
#include "device.h"
#include "planted.h"

namespace faults {

using namespace moe;
using T = __nv_bfloat16;

constexpr int kSteps = 8;

// d [64, 64] = a [64, 64 kSteps] . b [64, 64 kSteps]^T, steps of 64 through two stages.
struct Operands {
  alignas(1024) T a[64 * 64];
  alignas(1024) T b[64 * 64];
};
struct Shared {
  Operands stages[2];
  arch::Barrier full[2], empty[2];
  alignas(1024) float d[64 * 64];
};

struct Params {
  arch::TensorMap a, b, d;
  arch::TensorMap half_of_b;  // 32 rows
  const T *a_rows, *b_rows;   // [64, 64 kSteps]
  float* out;                 // [64, 64]
};

enum class Fault {
  none,
  store_before_wgmma,
  copy_before_wgmma,
  store_before_tma_store,
  fence_too_early,
  slot_released_early,
  accumulators_read_early,
  missing_wgmma_fence,
  missing_wait,
  wrong_bytes,
  missing_barrier_fence,
  too_many_arrivals,
  overwritten_while_stored,
  store_not_waited_for,
  wgmma_not_waited_for,
  warps_disagree,
  own_consumers_only,
  ends_before_its_neighbour,
  idle_block_ends,
};

__device__ void init_barriers(Shared& shared, uint32_t producers, bool fence) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) shared.full[i].init(producers), shared.empty[i].init(128);
    if (fence) arch::fence_barrier_init();
  }
  arch::sync_block();
}

// Consumers: four warps multiply what lies in the stages, and store it by TMA. release: by each thread, when it has
// read.
template <Fault fault, bool by_threads>
__device__ void consume(Shared& shared, const Params& p, auto release) {
  float d[32];
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % 2;
    const auto parity = uint32_t(step / 2 % 2);
    if (fault != Fault::missing_wait) shared.full[stage].wait(parity);
    if (by_threads && fault != Fault::copy_before_wgmma) arch::fence_async_proxy();
    arch::wgmma_hold(d);
    if (fault != Fault::missing_wgmma_fence) arch::wgmma_fence();
    const uint64_t a = arch::wgmma_along_k(shared.stages[stage].a), b = arch::wgmma_along_k(shared.stages[stage].b);
    for (uint32_t k = 0; k < (fault == Fault::warps_disagree && threadIdx.x / 32 == 2 ? 3 : 4); ++k)
      arch::wgmma<T, 64>(d, arch::wgmma_advance(a, 32 * k), arch::wgmma_advance(b, 32 * k), step > 0 || k > 0);
    arch::wgmma_commit();
    if (fault == Fault::slot_released_early) release(shared.empty[stage]);
    if (fault == Fault::wgmma_not_waited_for && step == kSteps - 1) return;
    if (fault == Fault::accumulators_read_early && step == kSteps - 1) break;
    arch::wgmma_wait<0>();
    arch::wgmma_hold(d);
    if (fault != Fault::slot_released_early) release(shared.empty[stage]);
  }
  if (fault == Fault::fence_too_early) arch::fence_async_proxy();
  const int row = int(threadIdx.x) / 32 * 16 + arch::lane_id() / 4, column = arch::lane_id() % 4 * 2;
  for (int i = 0; i < 32; ++i) shared.d[(row + i % 4 / 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
  if (fault != Fault::store_before_tma_store && fault != Fault::fence_too_early) arch::fence_async_proxy();
  arch::sync_threads(1, 128);
  if (threadIdx.x == 0) {
    arch::tma_store(p.d, shared.d, 0, 0);
    arch::tma_commit();
    if (fault == Fault::overwritten_while_stored) shared.d[1] = 0.5f;
    if (fault != Fault::store_not_waited_for) arch::tma_wait_read<0>();
  }
  if (fault == Fault::accumulators_read_early) arch::wgmma_wait<0>();
}

template <Fault fault, bool by_threads>
__device__ void consume(Shared& shared, const Params& p) {
  consume<fault, by_threads>(shared, p, [](arch::Barrier& empty) { empty.arrive(); });
}

// A warp loads the stages by TMA.
template <Fault fault>
__global__ void by_tma(const __grid_constant__ Params p) {
  auto& shared = arch::shared<Shared>();
  init_barriers(shared, 1, fault != Fault::missing_barrier_fence);
  if (threadIdx.x < 128) return consume<fault, false>(shared, p);
  if (threadIdx.x > 128) return;
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % 2;
    shared.empty[stage].wait(uint32_t(step / 2 % 2) ^ 1);
    shared.full[stage].arrive_expect_bytes(sizeof(Operands) - (fault == Fault::wrong_bytes ? 128 : 0));
    if (fault == Fault::too_many_arrivals) shared.full[stage].arrive();
    arch::tma_load(shared.stages[stage].a, p.a, shared.full[stage], 64 * step, 0);
    arch::tma_load(shared.stages[stage].b, p.b, shared.full[stage], 64 * step, 0);
  }
}

// Two blocks of a cluster do the same: each loads half of b for both. An idle one leaves it all to the other.
template <Fault fault>
__global__ void by_multicast(const __grid_constant__ Params p) {
  auto& shared = arch::shared<Shared>();
  constexpr bool idles = fault == Fault::idle_block_ends;
  constexpr uint32_t readers = fault == Fault::own_consumers_only || idles ? 1 : 2;
  const uint32_t rank = arch::block_in_cluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) shared.full[i].init(1), shared.empty[i].init(128 * readers);
    arch::fence_barrier_init();
  }
  arch::sync_cluster();
  if (idles && rank == 1) return;
  if (threadIdx.x < 128) {
    consume<fault, false>(shared, p, [&](arch::Barrier& empty) {
      for (uint32_t i = 0; i < readers; ++i) arch::BarriersOfBlock(empty, (rank + i) % 2).arrive_at(empty);
    });
  } else if (threadIdx.x == 128) {
    for (int step = 0; step < kSteps; ++step) {
      const int stage = step % 2;
      shared.empty[stage].wait(uint32_t(step / 2 % 2) ^ 1);
      shared.full[stage].arrive_expect_bytes(sizeof(Operands));
      arch::tma_load(shared.stages[stage].a, p.a, shared.full[stage], 64 * step, 0);
      for (int row = 0; row < 64; row += 32)
        if (idles || int(rank) == row / 32)
          arch::tma_load_to(0b11, shared.stages[stage].b + row * 64, p.half_of_b, shared.full[stage], 64 * step, row);
    }
  }
  if (fault != Fault::ends_before_its_neighbour) arch::sync_cluster();
}

// Threads bring the stages: by cp.async, or by stores of their own.
template <Fault fault>
__global__ void by_threads(const __grid_constant__ Params p) {
  auto& shared = arch::shared<Shared>();
  constexpr bool stores = fault == Fault::store_before_wgmma;
  init_barriers(shared, 32, true);
  if (threadIdx.x < 128) return consume<fault, !stores>(shared, p);
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % 2;
    shared.empty[stage].wait(uint32_t(step / 2 % 2) ^ 1);
    for (int i = arch::lane_id(); i < 512; i += 32) {
      const int row = i / 8, to = row * 64 + ((i % 8) ^ row % 8) * 8, from = row * 64 * kSteps + 64 * step + i % 8 * 8;
      using Chunk = arch::Pack<T, 8>;
      if (stores) {
        arch::store(&shared.stages[stage].a[to], arch::load<Chunk>(p.a_rows + from));
        arch::store(&shared.stages[stage].b[to], arch::load<Chunk>(p.b_rows + from));
      } else {
        arch::copy_async_16(&shared.stages[stage].a[to], p.a_rows + from);
        arch::copy_async_16(&shared.stages[stage].b[to], p.b_rows + from);
      }
    }
    if (stores) shared.full[stage].arrive();
    else shared.full[stage].arrive_after_copies();
  }
  arch::copy_async_wait<0>();
}

// The mended twin of store_before_wgmma: the fence follows the stores.
__global__ void by_stores(const __grid_constant__ Params p) {
  auto& shared = arch::shared<Shared>();
  init_barriers(shared, 32, true);
  if (threadIdx.x < 128) return consume<Fault::none, false>(shared, p);
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % 2;
    shared.empty[stage].wait(uint32_t(step / 2 % 2) ^ 1);
    for (int i = arch::lane_id(); i < 64 * 64; i += 32) {
      const int row = i / 64, to = row * 64 + ((i % 64 / 8) ^ row % 8) * 8 + i % 8,
                from = row * 64 * kSteps + 64 * step + i % 64;
      shared.stages[stage].a[to] = p.a_rows[from], shared.stages[stage].b[to] = p.b_rows[from];
    }
    arch::fence_async_proxy();
    shared.full[stage].arrive();
  }
}

void run(void (*kernel)(Params), unsigned blocks) {
  Device device;
  const int count = 64 * 64 * kSteps;
  auto* a = static_cast<T*>(device.scratch(count * 2));
  auto* b = static_cast<T*>(device.scratch(count * 2));
  auto* out = static_cast<float*>(device.scratch(64 * 64 * 4));
  for (int i = 0; i < count; ++i) a[i] = float(i % 7 - 3), b[i] = float(i % 5 - 2);
  BoxedTensor of_a{.data = a,
                   .dtype = Dtype::bfloat16,
                   .rank = 2,
                   .sizes = {64 * kSteps, 64, 1},
                   .strides = {64 * kSteps, 0},
                   .box = {64, 64, 1}};
  BoxedTensor of_b = of_a, of_d = of_a;
  of_b.data = b;
  BoxedTensor of_half = of_b;
  of_half.box = {64, 32, 1};
  of_d.data = out, of_d.dtype = Dtype::float32, of_d.sizes = {64, 64, 1}, of_d.strides = {64, 0}, of_d.swizzled = false;
  const Params params{.a = tensor_map(of_a, "faults"),
                      .b = tensor_map(of_b, "faults"),
                      .d = tensor_map(of_d, "faults"),
                      .half_of_b = tensor_map(of_half, "faults"),
                      .a_rows = a,
                      .b_rows = b,
                      .out = out};
  launch({.grid = dim3(blocks), .block = dim3(160), .shared_bytes = sizeof(Shared), .cluster = blocks}, kernel, params);
  check(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < 64 * 64; ++i) {
    float sum = 0;
    for (int k = 0; k < 64 * kSteps; ++k)
      sum += float(a[i / 64 * 64 * kSteps + k]) * float(b[i % 64 * 64 * kSteps + k]);
    if (!(out[i] == sum)) throw std::runtime_error("wrong: d[" + std::to_string(i) + "]");
  }
  std::puts("right");
}

// ---- Without a product
// -----------------------------------------------------------------------------------------------

struct NumberShared {
  int number;
  arch::Barrier come;
};

// A warp does not wait until the other has read.
template <bool mended>
__global__ void missing_named_barrier(int* out) {
  auto& shared = arch::shared<NumberShared>();
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x == 0) shared.number = i;
    arch::sync_threads(1, 64);
    if (threadIdx.x >= 32) out[i] = shared.number;
    if constexpr (mended) arch::sync_threads(2, 64);
  }
}

// The barrier's other half counts other threads.
template <bool mended>
__global__ void wrong_count_of_threads(int* out) {
  if (threadIdx.x < 32) arch::arrive_threads(1, mended ? 64 : 32);
  else arch::sync_threads(1, 64);
  if (threadIdx.x < 4) out[threadIdx.x] = int(threadIdx.x);
}

// More registers than the other half of the block gives.
template <bool mended>
__global__ void too_few_registers(int* out) {
  if (threadIdx.x < 128) arch::give_registers<mended ? 40 : 96>();
  else arch::take_registers<232>();
  if (threadIdx.x < 4) out[threadIdx.x] = int(threadIdx.x);
}

// A block ends before its neighbour has told it what it does not wait for.
template <bool mended>
__global__ void block_ends_early(int* out) {
  auto& shared = arch::shared<NumberShared>();
  if (threadIdx.x == 0) shared.come.init(1), shared.number = 0;
  arch::sync_cluster();
  if (threadIdx.x == 0 && arch::block_in_cluster() == 0) {
    for (int i = 0; i < 200; ++i) arch::sync_warp(1);
    for (int i = 0; i < 4; ++i) out[i] = i + *arch::in_block(&shared.number, 1);
    shared.come.arrive_at(1);
  }
  if constexpr (mended) arch::sync_cluster();
}

// The last rounds' parity stands still.
template <bool mended>
__global__ void wrong_parity(int* out) {
  auto& shared = arch::shared<NumberShared>();
  if (threadIdx.x == 0) shared.come.init(1);
  arch::sync_block();
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x == 0) out[i] = i, shared.come.arrive();
    shared.come.wait(mended ? uint32_t(i % 2) : 1);
    arch::sync_block();
  }
  if (!mended) shared.come.wait(0);
}

void run_small(void (*kernel)(int*), unsigned blocks, unsigned threads) {
  Device device;
  auto* out = static_cast<int*>(device.scratch(4 * 4));
  launch({.grid = dim3(blocks), .block = dim3(threads), .shared_bytes = sizeof(NumberShared), .cluster = blocks},
         kernel, out);
  check(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < 4; ++i)
    if (out[i] != i) throw std::runtime_error("wrong: out[" + std::to_string(i) + "]");
  std::puts("right");
}

}  // namespace faults

int main(int argc, char** argv) {
  using namespace faults;
  return run_planted(argc, argv, [](const std::string& name, bool mended) {
    using Kernel = void (*)(Params);
    const std::map<std::string, Kernel> products{
        {"store_before_wgmma", mended ? by_stores : by_threads<Fault::store_before_wgmma>},
        {"copy_before_wgmma", mended ? by_threads<Fault::none> : by_threads<Fault::copy_before_wgmma>},
        {"store_before_tma_store", mended ? by_tma<Fault::none> : by_tma<Fault::store_before_tma_store>},
        {"fence_too_early", mended ? by_tma<Fault::none> : by_tma<Fault::fence_too_early>},
        {"slot_released_early", mended ? by_tma<Fault::none> : by_tma<Fault::slot_released_early>},
        {"copies_over_a_running_wgmma", mended ? by_threads<Fault::none> : by_threads<Fault::slot_released_early>},
        {"accumulators_read_early", mended ? by_tma<Fault::none> : by_tma<Fault::accumulators_read_early>},
        {"missing_wgmma_fence", mended ? by_tma<Fault::none> : by_tma<Fault::missing_wgmma_fence>},
        {"missing_wait_for_tma", mended ? by_tma<Fault::none> : by_tma<Fault::missing_wait>},
        {"missing_wait_for_copies", mended ? by_threads<Fault::none> : by_threads<Fault::missing_wait>},
        {"wrong_bytes", mended ? by_tma<Fault::none> : by_tma<Fault::wrong_bytes>},
        {"missing_barrier_fence", mended ? by_tma<Fault::none> : by_tma<Fault::missing_barrier_fence>},
        {"too_many_arrivals", mended ? by_tma<Fault::none> : by_tma<Fault::too_many_arrivals>},
        {"overwritten_while_stored", mended ? by_tma<Fault::none> : by_tma<Fault::overwritten_while_stored>},
        {"store_not_waited_for", mended ? by_tma<Fault::none> : by_tma<Fault::store_not_waited_for>},
        {"warps_disagree", mended ? by_tma<Fault::none> : by_tma<Fault::warps_disagree>},
        {"wgmma_not_waited_for", mended ? by_tma<Fault::none> : by_tma<Fault::wgmma_not_waited_for>},
    };
    const std::map<std::string, Kernel> of_clusters{
        {"own_consumers_only", mended ? by_multicast<Fault::none> : by_multicast<Fault::own_consumers_only>},
        {"ends_before_its_neighbour",
         mended ? by_multicast<Fault::none> : by_multicast<Fault::ends_before_its_neighbour>},
        {"idle_block_ends", mended ? by_multicast<Fault::none> : by_multicast<Fault::idle_block_ends>},
    };
    if (name == "missing_named_barrier") {
      run_small(mended ? missing_named_barrier<true> : missing_named_barrier<false>, 1, 64);
    } else if (name == "wrong_count_of_threads") {
      run_small(mended ? wrong_count_of_threads<true> : wrong_count_of_threads<false>, 1, 64);
    } else if (name == "too_few_registers") {
      run_small(mended ? too_few_registers<true> : too_few_registers<false>, 1, 384);
    } else if (name == "block_ends_early") {
      run_small(mended ? block_ends_early<true> : block_ends_early<false>, 2, 32);
    } else if (name == "wrong_parity") {
      run_small(mended ? wrong_parity<true> : wrong_parity<false>, 1, 64);
    } else if (of_clusters.contains(name)) {
      run(of_clusters.at(name), 2);
    } else {
      run(products.at(name), 1);
    }
  });
}
