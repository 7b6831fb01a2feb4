// combine and its backward: cuts the tokens into contiguous pieces.
#include "cpu/device.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace moe {

void combine(const CombineParams& p, const Device&) {
  if (p.hidden == 0) return;
  const Kernels& isa = kernels();
  for_each_range(p.tokens, p.width * p.hidden, [&](int64_t begin, int64_t end) { isa.combine(p, begin, end); });
}

void combine_backward(const CombineBackwardParams& p, const Device&) {
  const Kernels& isa = kernels();
  for_each_range(p.tokens, p.width * p.hidden,
                 [&](int64_t begin, int64_t end) { isa.combine_backward(p, begin, end); });
  const int64_t size = size_of(p.grad_y.dtype);
  if (p.grad_rows)
    clear_dropped_rows(p.row_slot, p.slot_row, p.tokens * p.width, p.num_rows, p.grad_rows.data,
                       p.grad_rows.stride * size, p.hidden * size);
}

}  // namespace moe
