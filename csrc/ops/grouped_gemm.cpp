// The grouped GEMMs as operators: rows times the weights of their expert, and the gradients of weights and biases.
#include "ops/gemm_operands.h"

namespace moe {

namespace {

struct Rows {
  Tensor tensor, row_slot;
  GatheredRows operand;
  int64_t count;
};

// `a` itself, or its rows row_slot // width.
Rows read_rows(const char* what, const Tensor& a, const OptionalTensor& row_slot, int64_t width) {
  Rows rows{.tensor = with_unit_rows(a), .row_slot = {}, .operand = {}, .count = a.size(0)};
  if (row_slot) {
    expect_row_slot(what, *row_slot, a.size(0));
    STD_TORCH_CHECK(width > 0 || row_slot->size(0) == 0, what, ": width must be positive");
    rows.row_slot = as_contiguous(*row_slot);
    rows.count = rows.row_slot.size(0);
    rows.operand = gathered(rows.tensor, int32s(rows.row_slot), width);
  } else {
    rows.operand = rows_of(rows.tensor);
  }
  return rows;
}

Tensor grouped_gemm_op(const Tensor& a, const Tensor& weight, const Tensor& offsets, const OptionalTensor& bias,
                       const OptionalTensor& row_slot, const OptionalTensor& slot_row, const OptionalTensor& panels,
                       bool allow_tf32, bool batch_invariant) {
  expect_shape("grouped_gemm: a", a, {-1, -1});
  STD_TORCH_CHECK(!row_slot || slot_row, "grouped_gemm: row_slot without slot_row");
  expect_weights("grouped_gemm: weight", weight, a, -1, a.size(1));
  expect_panels("grouped_gemm: panels", panels, weight, a);
  expect_offsets("grouped_gemm: offsets", offsets, weight.size(0));
  expect_bias("grouped_gemm: bias", bias, a, weight.size(0), weight.size(1));
  if (slot_row) expect_shape("grouped_gemm: slot_row", *slot_row, {a.size(0), -1});
  const auto rows = read_rows("grouped_gemm: row_slot", a, row_slot, slot_row ? slot_row->size(1) : 1);
  const auto w = panels ? weight : with_unit_stride(weight), starts = as_contiguous(offsets);
  const auto b = as_contiguous(bias);
  auto out = empty({rows.count, w.size(1)}, a.scalar_type(), a);
  grouped_gemm({.a = rows.operand,
                .weight = expert_weights(w, panels),
                .offsets = int32s(starts),
                .num_experts = w.size(0),
                .num_rows = rows.count,
                .n = w.size(1),
                .k = w.size(2),
                .bias = vector(b),
                .allow_tf32 = allow_tf32,
                .batch_invariant = batch_invariant,
                .out = matrix(out)},
               Device(a));
  return out;
}

// out [E, N, K] (+)= grad^T . a over the rows of each expert; transposed: in memory [E, K, N], a^T . grad.
void weight_grad(const Tensor& out, bool accumulate, bool transposed, const Tensor& grad, const Tensor& a,
                 const Tensor& offsets, const OptionalTensor& row_slot, int64_t width, bool allow_tf32) {
  expect_offsets("grouped_gemm_weight_grad: offsets", offsets, out.size(0));
  expect_type("grouped_gemm_weight_grad: a", a, grad.scalar_type());
  const auto rows = read_rows("grouped_gemm_weight_grad: row_slot", a, row_slot, width);
  STD_TORCH_CHECK(rows.count == grad.size(0), "grouped_gemm_weight_grad: grad and a have different numbers of rows");
  const auto g = with_unit_rows(grad), starts = as_contiguous(offsets);
  grouped_gemm_weight_grad({.grad = transposed ? rows.operand : rows_of(g),
                            .a = transposed ? rows_of(g) : rows.operand,
                            .offsets = int32s(starts),
                            .num_experts = out.size(0),
                            .num_rows = rows.count,
                            .n = out.size(transposed ? 2 : 1),
                            .k = out.size(transposed ? 1 : 2),
                            .out = out.data_ptr(),
                            .out_dtype = dtype_of(out),
                            .accumulate = accumulate,
                            .allow_tf32 = allow_tf32},
                           Device(grad));
}

Tensor grouped_gemm_weight_grad_op(const Tensor& grad, const Tensor& a, const Tensor& offsets,
                                   const OptionalTensor& row_slot, int64_t width, ScalarType dtype, bool allow_tf32,
                                   bool transposed) {
  expect_shape("grouped_gemm_weight_grad: grad", grad, {-1, -1});
  expect_shape("grouped_gemm_weight_grad: a", a, {-1, -1});
  expect_shape("grouped_gemm_weight_grad: offsets", offsets, {-1});
  STD_TORCH_CHECK(offsets.size(0) > 0, "grouped_gemm_weight_grad: offsets is empty");
  auto out = empty_weight_grad(offsets.size(0) - 1, grad.size(1), a.size(1), dtype, transposed, grad);
  weight_grad(out, false, transposed, grad, a, offsets, row_slot, width, allow_tf32);
  return out;
}

void grouped_gemm_weight_grad_accumulate_op(const Tensor& out, const Tensor& grad, const Tensor& a,
                                            const Tensor& offsets, const OptionalTensor& row_slot, int64_t width,
                                            bool allow_tf32) {
  expect_shape("grouped_gemm_weight_grad_: grad", grad, {-1, -1});
  expect_shape("grouped_gemm_weight_grad_: a", a, {-1, -1});
  expect_shape("grouped_gemm_weight_grad_: out", out, {-1, grad.size(1), a.size(1)});
  STD_TORCH_CHECK(out.is_contiguous(), "grouped_gemm_weight_grad_: out is not contiguous");
  weight_grad(out, true, false, grad, a, offsets, row_slot, width, allow_tf32);
}

Tensor grouped_gemm_bias_grad_op(const Tensor& grad, const Tensor& offsets, ScalarType dtype) {
  expect_shape("grouped_gemm_bias_grad: grad", grad, {-1, -1});
  expect_shape("grouped_gemm_bias_grad: offsets", offsets, {-1});
  STD_TORCH_CHECK(offsets.size(0) > 0, "grouped_gemm_bias_grad: offsets is empty");
  expect_type("grouped_gemm_bias_grad: offsets", offsets, ScalarType::Int);
  const auto g = with_unit_rows(grad), starts = as_contiguous(offsets);
  const int64_t num_experts = offsets.size(0) - 1;
  auto out = empty({num_experts, grad.size(1)}, dtype, grad);
  grouped_gemm_bias_grad({.grad = rows_of(g),
                          .offsets = int32s(starts),
                          .num_experts = num_experts,
                          .num_rows = grad.size(0),
                          .n = grad.size(1),
                          .out = out.data_ptr(),
                          .out_dtype = dtype_of(out)},
                         Device(grad));
  return out;
}

const Register kGroupedGemm("grouped_gemm", TORCH_BOX(&grouped_gemm_op));
const Register kWeightGrad("grouped_gemm_weight_grad", TORCH_BOX(&grouped_gemm_weight_grad_op));
const Register kWeightGradAccumulate("grouped_gemm_weight_grad_", TORCH_BOX(&grouped_gemm_weight_grad_accumulate_op));
const Register kBiasGrad("grouped_gemm_bias_grad", TORCH_BOX(&grouped_gemm_bias_grad_op));

}  // namespace

}  // namespace moe
