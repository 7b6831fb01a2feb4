// permute: copies the row of x that each row of the plan names.
#include <cstring>

#include "cpu/device.h"
#include "cpu/parallel.h"

namespace moe {

void permute(const PermuteParams& p, const Device&) {
  if (p.row_bytes == 0) return;
  const uint32_t slots = uint32_t(p.tokens * p.width), width = uint32_t(p.width);
  for_each_range(p.rows, p.row_bytes / int64_t(sizeof(float)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      char* to = static_cast<char*>(p.out) + row * p.row_bytes;
      uint32_t slot = uint32_t(p.row_slot[row]);
      if (slot < slots && p.slot_row[slot] == row) {
        std::memcpy(to, static_cast<const char*>(p.x) + slot / width * p.x_stride_bytes, p.row_bytes);
      } else {
        std::memset(to, 0, p.row_bytes);
      }
    }
  });
}

}  // namespace moe
