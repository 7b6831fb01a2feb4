// The path from tokens to tokens: GEMM with the activation in its epilogue, GEMM, combine; rows of x are read where
// they lie, no permuted copy is made. Kept for the backward: the pre-activation, and nothing else that is not an input.
// moe_mlp_inference plans as well, and keeps nothing.
#include "ops/gemm_operands.h"

namespace moe {

namespace {

// A plan's arrays, and the tensors that hold them.
struct PlanArrays {
  std::array<Tensor, 3> held;
  int32_t *offsets, *row_slot, *slot_row;
  int64_t rows, width;
};

// What every pass reads alike.
struct Layer {
  Tensor x, weights, w_in, w_out;  // as the stages want them
  int64_t tokens, hidden, num_experts, inner, pre_cols;
  Activation activation;
  bool weight_on_input, allow_tf32, batch_invariant;
  PlanArrays plan = {};

  Vector score() const { return {.data = weights.data_ptr(), .dtype = dtype_of(weights)}; }
  Vector on_input() const { return weight_on_input ? score() : Vector{}; }
  Vector on_output() const { return weight_on_input ? Vector{} : score(); }
};

// All but the plan, which the caller sets: it is checked against the rest.
Layer layer(const Tensor& x, const Tensor& weights, const Tensor& w_in, const Tensor& w_out, int64_t act, bool gated,
            bool interleaved, double alpha, double limit, double up_offset, bool weight_on_input, bool allow_tf32,
            bool batch_invariant, const OptionalTensor& panels_in = {}, const OptionalTensor& panels_out = {}) {
  expect_shape("moe_mlp: x", x, {-1, -1});
  expect_weights("moe_mlp: w_in", w_in, x, -1, x.size(1));
  const int64_t num_experts = w_in.size(0), inner = gated ? w_in.size(1) / 2 : w_in.size(1);
  STD_TORCH_CHECK(!gated || w_in.size(1) % 2 == 0, "moe_mlp: w_in has an odd number of rows");
  expect_weights("moe_mlp: w_out", w_out, x, x.size(1), inner);
  STD_TORCH_CHECK(w_out.size(0) == num_experts, "moe_mlp: w_in and w_out have different numbers of experts");
  expect_panels("moe_mlp: panels_in", panels_in, w_in, x);
  expect_panels("moe_mlp: panels_out", panels_out, w_out, x);
  expect_shape("moe_mlp: weights", weights, {x.size(0), -1});
  expect_device("moe_mlp: weights", weights, x);
  expect_device("moe_mlp: w_in", w_in, x);
  expect_device("moe_mlp: w_out", w_out, x);
  STD_TORCH_CHECK(act >= 0 && act <= int64_t(Act::relu2), "moe_mlp: unknown activation");
  return {.x = with_unit_rows(x),
          .weights = as_contiguous(weights),
          .w_in = panels_in ? w_in : with_unit_stride(w_in),
          .w_out = panels_out ? w_out : with_unit_stride(w_out),
          .tokens = x.size(0),
          .hidden = x.size(1),
          .num_experts = num_experts,
          .inner = inner,
          .pre_cols = w_in.size(1),
          .activation = {Act(act), gated, interleaved, alpha, limit, up_offset},
          .weight_on_input = weight_on_input,
          .allow_tf32 = allow_tf32,
          .batch_invariant = batch_invariant};
}

PlanArrays given_plan(const Layer& m, const Tensor& offsets, const Tensor& row_slot, const Tensor& slot_row) {
  expect_offsets("moe_mlp: offsets", offsets, m.num_experts);
  expect_row_slot("moe_mlp: row_slot", row_slot, m.tokens);
  expect_map("moe_mlp: slot_row", slot_row, {m.tokens, m.weights.size(1)});
  STD_TORCH_CHECK(slot_row.size(1) > 0 || row_slot.size(0) == 0, "moe_mlp: slot_row has no columns");
  const Tensor starts = as_contiguous(offsets), slots = as_contiguous(row_slot), rows = as_contiguous(slot_row);
  return {.held = {starts, slots, rows},
          .offsets = int32s(starts),
          .row_slot = int32s(slots),
          .slot_row = int32s(rows),
          .rows = row_slot.size(0),
          .width = slot_row.size(1)};
}

// The plan of every slot of `experts`, its arrays in one tensor: one allocation.
PlanArrays make_plan(const Layer& m, const Tensor& experts) {
  const bool is_int64 = expect_ids("moe_mlp: experts", experts, {m.tokens, m.weights.size(1)});
  expect_device("moe_mlp: experts", experts, m.x);
  STD_TORCH_CHECK(m.num_experts >= 1 && m.num_experts < std::numeric_limits<int32_t>::max(),
                  "moe_mlp: w_in must hold between 1 and 2^31 - 2 experts");
  const int64_t slots = experts.numel();
  const Tensor ids = as_contiguous(experts);
  // row_slot [slots], slot_row [slots], offsets [E + 1], counts [E]
  const Tensor arrays = empty({2 * slots + 2 * m.num_experts + 1}, ScalarType::Int, experts);
  PlanArrays made{.held = {arrays}, .row_slot = int32s(arrays), .rows = slots, .width = experts.size(1)};
  made.slot_row = made.row_slot + slots;
  made.offsets = made.slot_row + slots;
  plan({.experts = ids.data_ptr(),
        .experts_are_int64 = is_int64,
        .tokens = m.tokens,
        .top_k = made.width,
        .num_experts = m.num_experts,
        .offsets = made.offsets,
        .row_slot = made.row_slot,
        .slot_row = made.slot_row,
        .counts = made.offsets + m.num_experts + 1},
       Device(ids));
  return made;
}

// y[t] = sum over the rows of token t, times their weights where given.
Tensor combine_rows(const Layer& m, const Tensor& rows, Vector weights, const Device& device) {
  auto y = empty({m.tokens, m.hidden}, rows.scalar_type(), rows);
  combine({.rows = matrix(rows),
           .weights = weights,
           .slot_row = m.plan.slot_row,
           .tokens = m.tokens,
           .width = m.plan.width,
           .num_rows = m.plan.rows,
           .hidden = m.hidden,
           .y = matrix(y)},
          device);
  return y;
}

// Returns y, and writes the pre-activation where `pre` has memory.
Tensor forward(const Layer& m, const OptionalTensor& b_in, const OptionalTensor& b_out, const OptionalTensor& panels_in,
               const OptionalTensor& panels_out, Matrix pre) {
  expect_bias("moe_mlp: b_in", b_in, m.x, m.num_experts, m.pre_cols);
  expect_bias("moe_mlp: b_out", b_out, m.x, m.num_experts, m.hidden);
  const auto bias_in = as_contiguous(b_in), bias_out = as_contiguous(b_out);
  const auto type = m.x.scalar_type();
  auto inner = empty({m.plan.rows, m.inner}, type, m.x), rows = empty({m.plan.rows, m.hidden}, type, m.x);
  const Device device(m.x);  // ends before what its kernels work on
  grouped_gemm({.a = gathered(m.x, m.plan.row_slot, m.plan.width, m.on_input()),
                .weight = expert_weights(m.w_in, panels_in),
                .offsets = m.plan.offsets,
                .num_experts = m.num_experts,
                .num_rows = m.plan.rows,
                .n = m.pre_cols,
                .k = m.hidden,
                .bias = vector(bias_in),
                .allow_tf32 = m.allow_tf32,
                .batch_invariant = m.batch_invariant,
                .epilogue = Epilogue::activate,
                .activation = m.activation,
                .out = matrix(inner),
                .pre = pre},
               device);

  grouped_gemm({.a = rows_of(inner),
                .weight = expert_weights(m.w_out, panels_out),
                .offsets = m.plan.offsets,
                .num_experts = m.num_experts,
                .num_rows = m.plan.rows,
                .n = m.hidden,
                .k = m.inner,
                .bias = vector(bias_out),
                .allow_tf32 = m.allow_tf32,
                .batch_invariant = m.batch_invariant,
                .out = matrix(rows)},
               device);
  return combine_rows(m, rows, m.on_output(), device);
}

std::tuple<Tensor, Tensor> moe_mlp_op(const Tensor& x, const Tensor& weights, const Tensor& w_in, const Tensor& w_out,
                                      const OptionalTensor& b_in, const OptionalTensor& b_out, const Tensor& offsets,
                                      const Tensor& row_slot, const Tensor& slot_row, int64_t activation, bool gated,
                                      bool interleaved, double alpha, double limit, double up_offset,
                                      bool weight_on_input, bool allow_tf32, bool batch_invariant, bool keep_pre,
                                      const OptionalTensor& panels_in, const OptionalTensor& panels_out) {
  Layer m = layer(x, weights, w_in, w_out, activation, gated, interleaved, alpha, limit, up_offset, weight_on_input,
                  allow_tf32, batch_invariant, panels_in, panels_out);
  m.plan = given_plan(m, offsets, row_slot, slot_row);
  auto pre = keep_pre ? empty({m.plan.rows, m.pre_cols}, x.scalar_type(), x) : empty({0}, x.scalar_type(), x);
  return {forward(m, b_in, b_out, panels_in, panels_out, keep_pre ? matrix(pre) : Matrix{}), pre};
}

// plan and moe_mlp in one call. Where weights come from memory, so does the host's code: the way of a second operator
// through torch takes as long as reading a megabyte of weights.
Tensor moe_mlp_inference_op(const Tensor& x, const Tensor& weights, const Tensor& experts, const Tensor& w_in,
                            const Tensor& w_out, const OptionalTensor& b_in, const OptionalTensor& b_out,
                            int64_t activation, bool gated, bool interleaved, double alpha, double limit,
                            double up_offset, bool weight_on_input, bool allow_tf32, bool batch_invariant,
                            const OptionalTensor& panels_in, const OptionalTensor& panels_out) {
  Layer m = layer(x, weights, w_in, w_out, activation, gated, interleaved, alpha, limit, up_offset, weight_on_input,
                  allow_tf32, batch_invariant, panels_in, panels_out);
  m.plan = make_plan(m, experts);
  return forward(m, b_in, b_out, panels_in, panels_out, {});
}

// The gradient of w: grad^T . a over the rows of each expert, or a^T . grad where w lies transposed.
Tensor weight_grad(const Layer& m, const GatheredRows& grad, const GatheredRows& a, const Tensor& w,
                   const Device& device) {
  const bool transposed = lies_transposed(w);
  const int64_t n = w.size(1), k = w.size(2);
  auto out = empty_weight_grad(m.num_experts, n, k, w.scalar_type(), transposed, m.x);
  grouped_gemm_weight_grad({.grad = transposed ? a : grad,
                            .a = transposed ? grad : a,
                            .offsets = m.plan.offsets,
                            .num_experts = m.num_experts,
                            .num_rows = m.plan.rows,
                            .n = transposed ? k : n,
                            .k = transposed ? n : k,
                            .out = out.data_ptr(),
                            .out_dtype = dtype_of(out),
                            .allow_tf32 = m.allow_tf32},
                           device);
  return out;
}

Tensor bias_grad(const Layer& m, const GatheredRows& grad, int64_t n, ScalarType dtype, const Device& device) {
  auto out = empty({m.num_experts, n}, dtype, m.x);
  grouped_gemm_bias_grad({.grad = grad,
                          .offsets = m.plan.offsets,
                          .num_experts = m.num_experts,
                          .num_rows = m.plan.rows,
                          .n = n,
                          .out = out.data_ptr(),
                          .out_dtype = dtype_of(out)},
                         device);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_backward_op(
    const Tensor& grad_y, const Tensor& x, const Tensor& pre, const Tensor& weights, const Tensor& w_in,
    const Tensor& w_out, const OptionalTensor& b_out, const Tensor& offsets, const Tensor& row_slot,
    const Tensor& slot_row, int64_t activation, bool gated, bool interleaved, double alpha, double limit,
    double up_offset, bool weight_on_input, bool allow_tf32, bool batch_invariant, std::optional<ScalarType> b_in_dtype,
    bool need_x, bool need_weights, bool need_w_in, bool need_w_out, bool need_b_out) {
  Layer m = layer(x, weights, w_in, w_out, activation, gated, interleaved, alpha, limit, up_offset, weight_on_input,
                  allow_tf32, batch_invariant);
  m.plan = given_plan(m, offsets, row_slot, slot_row);
  expect_shape("moe_mlp_backward: grad_y", grad_y, {m.tokens, m.hidden});
  expect_type("moe_mlp_backward: grad_y", grad_y, x.scalar_type());
  expect_type("moe_mlp_backward: pre", pre, x.scalar_type());
  expect_bias("moe_mlp_backward: b_out", b_out, x, m.num_experts, m.hidden);
  const auto dy = with_unit_rows(grad_y), h = as_contiguous(pre);
  const auto bias_out = as_contiguous(b_out);
  const auto none = [&](const Tensor& like) { return empty({0}, like.scalar_type(), x); };
  const auto gathered_dy = gathered(dy, m.plan.row_slot, m.plan.width);

  auto inner = empty({m.plan.rows, m.inner}, x.scalar_type(), x);
  auto grad_pre = empty({m.plan.rows, m.pre_cols}, x.scalar_type(), x);
  const bool need_score = need_weights && !weight_on_input, need_rows = need_x || (need_weights && weight_on_input);
  auto grad_score = need_score ? empty({m.tokens, m.plan.width}, compute_type(x), x) : none(x);
  auto grad_rows = need_rows ? empty({m.plan.rows, m.hidden}, x.scalar_type(), x) : none(x);
  Tensor grad_x = none(x), grad_weights = none(weights), grad_w_in, grad_w_out, grad_b_in, grad_b_out;
  {
    const Device device(x);  // ends before what its kernels work on
    // dA' = dY . W_out, and from it s A, dH and the score gradient
    if (need_x || need_weights || need_w_in || need_w_out || b_in_dtype) {
      expect_shape("moe_mlp_backward: pre", pre, {m.plan.rows, m.pre_cols});
      grouped_gemm({.a = gathered_dy,
                    .weight = expert_weights(m.w_out, /*transposed=*/true),
                    .offsets = m.plan.offsets,
                    .num_experts = m.num_experts,
                    .num_rows = m.plan.rows,
                    .n = m.inner,
                    .k = m.hidden,
                    .allow_tf32 = m.allow_tf32,
                    .batch_invariant = m.batch_invariant,
                    .epilogue = Epilogue::activate_backward,
                    .activation = m.activation,
                    .out = matrix(inner),
                    .pre = matrix(h),
                    .grad_pre = matrix(grad_pre),
                    .score = m.on_output(),
                    .score_bias = need_score ? vector(bias_out) : Vector{},
                    .grad_score = need_score ? grad_score.data_ptr() : nullptr},
                   device);
    }

    grad_w_out = need_w_out ? weight_grad(m, gathered_dy, rows_of(inner), w_out, device) : none(w_out);
    grad_b_out = need_b_out ? bias_grad(m, gathered(dy, m.plan.row_slot, m.plan.width, m.on_output()), m.hidden,
                                        b_out->scalar_type(), device)
                            : none(b_out ? *b_out : w_out);
    grad_w_in = need_w_in ? weight_grad(m, rows_of(grad_pre),
                                        gathered(m.x, m.plan.row_slot, m.plan.width, m.on_input()), w_in, device)
                          : none(w_in);
    grad_b_in = b_in_dtype ? bias_grad(m, rows_of(grad_pre), m.pre_cols, *b_in_dtype, device) : none(w_in);

    if (need_rows)
      grouped_gemm({.a = rows_of(grad_pre),
                    .weight = expert_weights(m.w_in, /*transposed=*/true),
                    .offsets = m.plan.offsets,
                    .num_experts = m.num_experts,
                    .num_rows = m.plan.rows,
                    .n = m.hidden,
                    .k = m.pre_cols,
                    .allow_tf32 = m.allow_tf32,
                    .batch_invariant = m.batch_invariant,
                    .out = matrix(grad_rows)},
                   device);
    if (need_x) grad_x = combine_rows(m, grad_rows, m.on_input(), device);
    if (need_weights && weight_on_input) {  // d(s x) = dX', so ds = <x, dX'>
      grad_weights = empty({m.tokens, m.plan.width}, weights.scalar_type(), x);
      combine_backward({.grad_y = matrix(m.x),
                        .rows = matrix(grad_rows),
                        .weights = m.score(),
                        .row_slot = m.plan.row_slot,
                        .slot_row = m.plan.slot_row,
                        .tokens = m.tokens,
                        .width = m.plan.width,
                        .num_rows = m.plan.rows,
                        .hidden = m.hidden,
                        .grad_weights = grad_weights.data_ptr()},
                       device);
    }
  }
  if (need_score) grad_weights = torch::stable::to(grad_score, weights.scalar_type());
  return {grad_x, grad_weights, grad_w_in, grad_w_out, grad_b_in, grad_b_out};
}

const Register kMoeMlp("moe_mlp", TORCH_BOX(&moe_mlp_op));
const Register kMoeMlpInference("moe_mlp_inference", TORCH_BOX(&moe_mlp_inference_op));
const Register kMoeMlpBackward("moe_mlp_backward", TORCH_BOX(&moe_mlp_backward_op));

}  // namespace

}  // namespace moe
