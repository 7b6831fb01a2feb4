// permute: the rows of x in expert order.
#include "ops/check.h"

namespace moe {
namespace {

Tensor permute_op(const Tensor& x_, const Tensor& row_slot_, const Tensor& slot_row_) {
  expect_shape("permute: x", x_, {-1, -1});
  expect_map("permute: row_slot", row_slot_, {-1});
  expect_map("permute: slot_row", slot_row_, {x_.size(0), -1});
  Tensor x = with_unit_rows(x_), row_slot = as_contiguous(row_slot_), slot_row = as_contiguous(slot_row_);
  const int64_t rows = row_slot.size(0), hidden = x.size(1), bytes = int64_t(x.element_size());
  Tensor out = empty({rows, hidden}, x.scalar_type(), x);
  permute(
      {
          .x = x.data_ptr(),
          .x_stride_bytes = x.stride(0) * bytes,
          .row_slot = int32s(row_slot),
          .slot_row = int32s(slot_row),
          .tokens = x.size(0),
          .width = slot_row.size(1),
          .rows = rows,
          .row_bytes = hidden * bytes,
          .out = out.data_ptr(),
      },
      Device(x));
  return out;
}

const Register kPermute("permute", TORCH_BOX(&permute_op));

}  // namespace
}  // namespace moe
