// Registers that change hands: a block begins with 65536 / threads of them each, and no other block beside it.
#pragma once

#include <cuda_runtime.h>

#include "cuda/arch/warp.cuh"

namespace moe::arch {

template <int count>
void take_registers(simt::Where where = simt::Where::current()) {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0);
  sync_warp(kAllLanes, where);
  simt::Block::current->grow_registers(count, where);
}

template <int count>
void give_registers(simt::Where where = simt::Where::current()) {
  static_assert(count >= 24 && count <= 256 && count % 8 == 0);
  sync_warp(kAllLanes, where);
  simt::Block::current->shrink_registers(count, where);
}

}  // namespace moe::arch
