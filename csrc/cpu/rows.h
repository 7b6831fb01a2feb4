// Rows of a plan that no token has: those of dropped slots.
#pragma once

#include <cstring>

#include "cpu/parallel.h"

namespace moe {

// Makes zeros of every row r of `out` whose slot is not one of 0..slots-1, or has another row.
inline void clear_dropped_rows(const int32_t* row_slot, const int32_t* slot_row, int64_t slots, int64_t rows, void* out,
                               int64_t stride_bytes, int64_t row_bytes) {
  for_each_range(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = row_slot[row];
      if (slot < 0 || slot >= slots || slot_row[slot] != row)
        std::memset(static_cast<char*>(out) + row * stride_bytes, 0, row_bytes);
    }
  });
}

}  // namespace moe
