// Barriers of some threads of a block.
#pragma once

#include <cuda_runtime.h>

#include "machine/schedule.h"

namespace moe::arch {

inline void expect_named_barrier(int barrier, int threads, simt::Where where) {
  if (barrier < 1 || barrier > 15) simt::fail("a named barrier " + std::to_string(barrier), where);
  if (threads <= 0 || threads % 32 || unsigned(threads) > simt::Block::current->number_of_threads())
    simt::fail("a barrier of " + std::to_string(threads) + " threads", where);
}

inline void sync_threads(int barrier, int threads, simt::Where where = simt::Where::current()) {
  expect_named_barrier(barrier, threads, where);
  simt::Block::current->sync(unsigned(barrier), unsigned(threads), where);
}

inline void arrive_threads(int barrier, int threads, simt::Where where = simt::Where::current()) {
  expect_named_barrier(barrier, threads, where);
  simt::Block::current->arrive(unsigned(barrier), unsigned(threads), where);
}

}  // namespace moe::arch
