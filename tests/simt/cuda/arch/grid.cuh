// Grids that overlap: machine/grid.h says how far.
#pragma once

#include <cuda_runtime.h>

#include "machine/schedule.h"

namespace moe::arch {

inline void wait_for_previous_grid(simt::Where where = simt::Where::current()) {
  simt::Block::current->wait_for_previous_grid(where);
}
inline void let_next_grid_start(simt::Where where = simt::Where::current()) {
  simt::Block::current->let_next_grid_start(where);
}

}  // namespace moe::arch
