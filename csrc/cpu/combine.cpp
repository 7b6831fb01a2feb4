// combine and its backward: cuts the tokens, or the rows, into contiguous pieces.
#include <cstring>

#include "cpu/device.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace moe {

void combine(const CombineParams& p, const Device&) {
  if (p.hidden == 0) return;
  const Kernels& isa = kernels();
  for_each_range(p.tokens, p.width * p.hidden, [&](int64_t begin, int64_t end) { isa.combine(p, begin, end); });
}

void combine_backward(const CombineBackwardParams& p, const Device&) {
  // Slots without a row, which no row reaches below.
  if (p.grad_weights) std::memset(p.grad_weights, 0, p.tokens * p.width * size_of(p.weights.dtype));
  if (p.hidden == 0) return;
  const Kernels& isa = kernels();
  for_each_range(p.num_rows, p.hidden, [&](int64_t begin, int64_t end) { isa.combine_backward(p, begin, end); });
}

}  // namespace moe
