// Blocks that run together: their threads take turns, block by block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "machine/schedule.h"

namespace moe::arch {

inline uint32_t block_in_cluster() { return simt::Block::current->rank(); }
inline uint32_t blocks_in_cluster() { return simt::Block::current->cluster().size(); }

inline void cluster_arrive(simt::Where where = simt::Where::current()) {
  simt::Block::current->cluster().arrive(where);
}
inline void cluster_wait(simt::Where where = simt::Where::current()) { simt::Block::current->cluster().wait(where); }
inline void sync_cluster(simt::Where where = simt::Where::current()) {
  cluster_arrive(where);
  cluster_wait(where);
}

template <class T>
T* in_block(T* shared, uint32_t block, simt::Where where = simt::Where::current()) {
  simt::Block& own = *simt::Block::current;
  if (!own.shared().holds(shared, sizeof(T))) simt::fail("in_block of no shared memory", where);
  if (block >= own.cluster().size())
    simt::fail("block " + std::to_string(block) + " of a cluster of " + std::to_string(own.cluster().size()), where);
  return reinterpret_cast<T*>(own.cluster().block(block).shared().data() + own.shared().offset(shared));
}

}  // namespace moe::arch
