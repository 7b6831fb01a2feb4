// permute: cuts the tokens into contiguous pieces.
#include "cpu/device.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace moe {

void permute(const PermuteParams& p, const Device&) {
  if (p.row_bytes == 0) return;
  const Kernels& isa = kernels();
  const int64_t slots = p.tokens * p.width;
  for_each_range(p.tokens, p.width * p.row_bytes / int64_t(sizeof(float)),
                 [&](int64_t begin, int64_t end) { isa.permute(p, begin, end); });
  clear_dropped_rows(p.row_slot, p.slot_row, slots, p.rows, p.out, p.row_bytes, p.row_bytes);
}

}  // namespace moe
