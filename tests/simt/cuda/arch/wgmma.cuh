// The multiply-accumulate of a warpgroup, warp by warp: see machine/wgmma.h for when what is seen.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/copy_async.cuh"
#include "cuda/arch/warp.cuh"
#include "cuda/arch/wgmma_shapes.cuh"

namespace moe::arch {

// Once for all lanes of the warp.
template <class F>
void of_the_warp(const char* instruction, F f, simt::Where where) {
  simt::Block::current->together<F>(instruction, 0xffffffff, f, [](const simt::Lanes<F>& all) { all[0](); }, where);
}

inline void wgmma_fence(simt::Where where = simt::Where::current()) {
  of_the_warp("wgmma_fence", [] { simt::Block::current->wgmmas().fence(); }, where);
}

inline void wgmma_commit(simt::Where where = simt::Where::current()) {
  of_the_warp("wgmma_commit", [] { simt::Block::current->wgmmas().commit(); }, where);
}

// The groups end beside the threads, so that others may do before what they must not.
template <int pending>
void wgmma_wait(simt::Where where = simt::Where::current()) {
  simt::Block& block = *simt::Block::current;
  simt::Wgmmas& wgmmas = block.wgmmas();
  const auto begin_to_wait = [&block, &wgmmas, where] {
    if (wgmmas.groups() <= pending) return;
    block.later("wgmma", [&block, &wgmmas, where] {
      wgmmas.wait(pending, where);
      block.wake(wgmmas.waiting);
    });
  };
  of_the_warp("wgmma_wait", begin_to_wait, where);
  while (wgmmas.groups() > pending) block.wait_in(wgmmas.waiting, "wgmma_wait", where);
}

template <int n>
void wgmma_hold(float (&)[n]) {}

inline uint64_t wgmma_operand(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t swizzle_128 = 1;
  return (shared_address(shared) & 0x3ffff) >> 4 | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32 | swizzle_128 << 62;
}

inline uint64_t wgmma_along_k(const void* shared, uint32_t stride_bytes = 1024) {
  return wgmma_operand(shared, 16, stride_bytes);
}

inline uint64_t wgmma_across_k(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes = 1024) {
  return wgmma_operand(shared, leading_bytes, stride_bytes);
}

inline uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }
inline uint64_t wgmma_advance_chunks(uint64_t operand, uint32_t chunks) { return operand + chunks; }

template <class T, int n, bool a_across = false, bool b_across = false>
void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate = true,
           simt::Where where = simt::Where::current()) {
  Wgmma<T, n>::template multiply<a_across, b_across>(d, a, b, accumulate, where);
}

}  // namespace moe::arch
