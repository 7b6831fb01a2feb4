// Copies from global to shared memory whose data land at the wait, not before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "machine/schedule.h"

namespace moe::arch {

// From the start of the block's shared memory.
inline uint32_t shared_address(const void* shared) { return uint32_t(simt::Block::current->shared().offset(shared)); }

template <int bytes>
void copy_async(void* shared, const void* global, int valid, simt::Where where) {
  if (!simt::Block::current->shared().holds(shared, bytes)) simt::fail("copy_async to no shared memory", where);
  if (valid < 0 || valid > bytes) simt::fail("copy_async of " + std::to_string(valid) + " bytes", where);
  simt::check_access("copy_async to shared memory", shared, bytes, bytes, where);
  simt::check_access("copy_async from global memory", global, size_t(valid), bytes, where);
  simt::Block::current->thread().copies.copy(shared, global, bytes, valid);
}

inline void copy_async_16(void* shared, const void* global, int valid = 16,
                          simt::Where where = simt::Where::current()) {
  copy_async<16>(shared, global, valid, where);
}

inline void copy_async_4(void* shared, const void* global, int valid = 4, simt::Where where = simt::Where::current()) {
  copy_async<4>(shared, global, valid, where);
}

inline void copy_async_commit() { simt::Block::current->thread().copies.commit(); }

template <int pending>
void copy_async_wait() {
  simt::Block::current->thread().copies.wait(pending);
}

}  // namespace moe::arch
