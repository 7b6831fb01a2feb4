// sm_90: barriers in shared memory that count threads and the bytes of asynchronous copies.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/copy_async.cuh"

namespace moe::arch {

// A phase is complete when all expected arrivals have come and all expected bytes have landed; the next one begins at
// once. Phases alternate in parity, 0 first: wait(0) waits for the first phase, wait(1) returns while the first runs.
struct Barrier {
  uint64_t state;

  // By one thread, before a fence and a barrier that the others pass. `count` arrivals complete a phase.
  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count) : "memory");
  }

  // What this thread wrote before is seen by those that wait.
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }

  // At the barrier of the same name of another block of the cluster.
  __device__ __forceinline__ void arrive_at(uint32_t block) {
    asm volatile(
        "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(shared_address(this)),
        "r"(block)
        : "memory");
  }

  // One arrival; the phase lasts until copies have brought so many bytes more.
  __device__ __forceinline__ void arrive_expect_bytes(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }

  // One arrival of those that were counted in init, when all copy_async of this thread up to here have landed.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this)) : "memory");
  }

  // Whether the phase of this parity is complete; may suspend the thread for a while.
  __device__ __forceinline__ bool try_wait(uint32_t parity) {
    uint32_t complete;
    asm volatile(
        "{.reg .pred complete; mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2; "
        "selp.b32 %0, 1, 0, complete;}"
        : "=r"(complete)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return complete;
  }

  __device__ __forceinline__ void wait(uint32_t parity) {
    while (!try_wait(parity)) {
    }
  }

  // Where other blocks of the cluster arrive, and what they wrote is read.
  __device__ __forceinline__ void wait_for_cluster(uint32_t parity) {
    uint32_t complete;
    do
      asm volatile(
          "{.reg .pred complete; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2; "
          "selp.b32 %0, 1, 0, complete;}"
          : "=r"(complete)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
    while (!complete);
  }
};

// Barriers of a block of the cluster, perhaps the own, which lives while they are used: their place is found once.
class BarriersOfBlock {
 public:
  // `any` barrier of this block.
  __device__ __forceinline__ BarriersOfBlock(const Barrier& any, uint32_t block) {
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(distance_) : "r"(shared_address(&any)), "r"(block));
    distance_ -= shared_address(&any);
  }

  // At the barrier of the same name there: says that this thread has read something. What it wrote is not handed over:
  // for that there is Barrier::arrive_at, a fence of the GPU each time.
  __device__ __forceinline__ void arrive_at(Barrier& same) const {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(shared_address(&same) + distance_) : "memory");
  }

 private:
  uint32_t distance_;  // from a barrier here to the one there
};

// After init: makes the barriers known to the cluster and to copies; a barrier of block or cluster follows.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace moe::arch
