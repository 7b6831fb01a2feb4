// combine: the weighted sum of each token's rows, and its gradients.
#include <tuple>

#include "ops/check.h"

namespace moe {
namespace {

// row_slot is there for the gradient alone.
Tensor combine_op(const Tensor& rows_, const OptionalTensor& weights_, const Tensor& row_slot,
                  const Tensor& slot_row_) {
  expect_shape("combine: rows", rows_, {-1, -1});
  expect_map("combine: row_slot", row_slot, {rows_.size(0)});
  expect_map("combine: slot_row", slot_row_, {-1, -1});
  const int64_t tokens = slot_row_.size(0), width = slot_row_.size(1);
  if (weights_) expect_shape("combine: weights", *weights_, {tokens, width});
  Tensor rows = with_unit_rows(rows_), slot_row = as_contiguous(slot_row_);
  OptionalTensor weights = as_contiguous(weights_);
  Tensor y = empty({tokens, rows.size(1)}, rows.scalar_type(), rows);
  combine(
      {
          .rows = matrix(rows),
          .weights = vector(weights),
          .slot_row = int32s(slot_row),
          .tokens = tokens,
          .width = width,
          .num_rows = rows.size(0),
          .hidden = rows.size(1),
          .y = matrix(y),
      },
      Device(rows));
  return y;
}

std::tuple<Tensor, Tensor> combine_backward_op(const Tensor& grad_y_, const OptionalTensor& rows_,
                                               const OptionalTensor& weights_, const Tensor& row_slot_,
                                               const Tensor& slot_row_, bool need_rows, bool need_weights) {
  expect_shape("combine_backward: grad_y", grad_y_, {-1, -1});
  expect_map("combine_backward: row_slot", row_slot_, {-1});
  expect_map("combine_backward: slot_row", slot_row_, {grad_y_.size(0), -1});
  STD_TORCH_CHECK(!need_weights || (rows_ && weights_), "combine_backward: grad_weights needs rows and weights");
  const int64_t tokens = grad_y_.size(0), hidden = grad_y_.size(1), width = slot_row_.size(1),
                num_rows = row_slot_.size(0);
  if (weights_) expect_shape("combine_backward: weights", *weights_, {tokens, width});

  Tensor grad_y = with_unit_rows(grad_y_), row_slot = as_contiguous(row_slot_), slot_row = as_contiguous(slot_row_);
  OptionalTensor rows, weights = as_contiguous(weights_);
  if (need_weights) {
    expect_shape("combine_backward: rows", *rows_, {num_rows, hidden});
    expect_type("combine_backward: rows", *rows_, grad_y.scalar_type());
    rows = with_unit_rows(*rows_);
  }
  const ScalarType weight_type = weights ? weights->scalar_type() : grad_y.scalar_type();
  Tensor grad_rows =
      need_rows ? empty({num_rows, hidden}, grad_y.scalar_type(), grad_y) : empty({0}, grad_y.scalar_type(), grad_y);
  Tensor grad_weights = need_weights ? empty({tokens, width}, weight_type, grad_y) : empty({0}, weight_type, grad_y);
  if (!need_rows && !need_weights) return {grad_rows, grad_weights};
  combine_backward(
      {
          .grad_y = matrix(grad_y),
          .rows = rows ? matrix(*rows) : Matrix{},
          .weights = vector(weights),
          .row_slot = int32s(row_slot),
          .slot_row = int32s(slot_row),
          .tokens = tokens,
          .width = width,
          .num_rows = num_rows,
          .hidden = hidden,
          .grad_rows = need_rows ? matrix(grad_rows) : Matrix{},
          .grad_weights = need_weights ? grad_weights.data_ptr() : nullptr,
      },
      Device(grad_y));
  return {grad_rows, grad_weights};
}

const Register kCombine("combine", TORCH_BOX(&combine_op));
const Register kCombineBackward("combine_backward", TORCH_BOX(&combine_backward_op));

}  // namespace
}  // namespace moe
