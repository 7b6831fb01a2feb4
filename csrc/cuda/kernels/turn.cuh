// When the grids of a stream touch memory: one after another, though a grid may start before the one ahead has ended.
#pragma once

#include "cuda/arch/grid.cuh"

namespace moe {

// By every thread of every kernel, on every path, before it reads or writes global memory: what earlier grids write is
// not there before, and what they read may lie where this one writes. The next grid is let in at once: its blocks come
// when all of this one have come, to room that none of them needs, and wait here.
__device__ __forceinline__ void take_turn() {
  arch::wait_for_previous_grid();
  arch::let_next_grid_start();
}

}  // namespace moe
