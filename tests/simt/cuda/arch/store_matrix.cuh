// Fragments of a warp to shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "machine/schedule.h"

namespace moe::arch {

struct StoreMatrixArgs {
  unsigned char* row;
  const uint32_t* in;
  simt::Where where;
};

// Row l / 4, columns 2 (l % 4) and the next, of matrix m, or of its transpose, stand in register m of lane l.
template <bool transposed>
void write_matrices(const simt::Lanes<StoreMatrixArgs>& all) {
  uint16_t matrix[32][8];
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned m = 0; m < 4; ++m)
      for (unsigned half = 0; half < 2; ++half) {
        const unsigned i = lane / 4, j = lane % 4 * 2 + half;
        matrix[8 * m + (transposed ? j : i)][transposed ? i : j] = uint16_t(all[lane].in[m] >> 16 * half);
      }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const StoreMatrixArgs& args = all[lane];
    if (!simt::Block::current->shared().holds(args.row, 16))
      simt::fail("store_matrix outside shared memory", args.where);
    simt::check_access("store_matrix", args.row, 16, 16, args.where);
    std::memcpy(args.row, matrix[lane], 16);
  }
}

inline void store_matrix_x4(void* shared_row, const uint32_t (&in)[4], simt::Where where = simt::Where::current()) {
  StoreMatrixArgs args{static_cast<unsigned char*>(shared_row), in, where};
  simt::Block::current->together("store_matrix_x4", 0xffffffff, args, write_matrices<false>, where);
}

inline void store_matrix_x4_transposed(void* shared_row, const uint32_t (&in)[4],
                                       simt::Where where = simt::Where::current()) {
  StoreMatrixArgs args{static_cast<unsigned char*>(shared_row), in, where};
  simt::Block::current->together("store_matrix_x4_transposed", 0xffffffff, args, write_matrices<true>, where);
}

}  // namespace moe::arch
