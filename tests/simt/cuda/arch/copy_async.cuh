// Copies from global to shared memory whose data land at the wait, not before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "machine/schedule.h"

namespace moe::arch {

// From the start of the block's shared memory.
inline uint32_t shared_address(const void* shared) { return uint32_t(simt::Block::current->shared().offset(shared)); }

inline void copy_async_16(void* shared, const void* global, int valid = 16,
                          simt::Where where = simt::Where::current()) {
  if (!simt::Block::current->shared().holds(shared, 16)) simt::fail("copy_async to no shared memory", where);
  if (valid < 0 || valid > 16) simt::fail("copy_async of " + std::to_string(valid) + " bytes", where);
  simt::check_access("copy_async to shared memory", shared, 16, 16, where);
  simt::check_access("copy_async from global memory", global, size_t(valid), 16, where);
  simt::Block::current->thread().copies.copy(shared, global, 16, valid);
  simt::Block::current->async_proxy().poison(shared, 16);
}

inline void copy_async_commit() { simt::Block::current->thread().copies.commit(); }

template <int pending>
void copy_async_wait() {
  simt::Block::current->thread().copies.wait(pending);
}

}  // namespace moe::arch
