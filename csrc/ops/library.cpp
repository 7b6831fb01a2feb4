// Every operator of the library, in dataflow order. Each has its public function, fake and docstring in python/moe_ops.
// Options that are one of several names travel as the number of the enumerator in stages/params.h. allow_tf32
// chooses among CUDA's kernels, batch_invariant among the CPU's too.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(moe_ops, m) {
  m.def(
      "route(Tensor logits, int top_k, int score, Tensor? selection_bias, Tensor? expert_scale, int num_groups,"
      " int top_groups, int group_score, int group_mask, int renormalize, float eps, float p, float scale, float "
      "softcap,"
      " bool stats, Tensor? segments, int num_segments)"
      " -> (Tensor weights, Tensor experts, Tensor counts, Tensor mean_prob, Tensor logsumexp)");
  m.def(
      "route_backward(Tensor? grad_weights, Tensor? grad_mean_prob, Tensor? grad_logsumexp, Tensor logits, Tensor "
      "experts,"
      " int score, Tensor? expert_scale, int renormalize, float eps, float p, float scale, float softcap,"
      " Tensor? segments, int num_segments) -> (Tensor grad_logits, Tensor grad_expert_scale)");

  m.def(
      "plan(Tensor experts, int num_experts, SymInt? capacity, int drop_policy, Tensor? weights)"
      " -> (Tensor offsets, Tensor row_slot, Tensor slot_row, Tensor counts)");

  m.def("permute(Tensor x, Tensor row_slot, Tensor slot_row) -> Tensor");

  m.def(
      "grouped_gemm(Tensor a, Tensor weight, Tensor offsets, Tensor? bias, Tensor? row_slot, Tensor? slot_row,"
      " Tensor? panels, bool allow_tf32, bool batch_invariant) -> Tensor");
  m.def(
      "grouped_gemm_weight_grad(Tensor grad, Tensor a, Tensor offsets, Tensor? row_slot, int width, ScalarType dtype,"
      " bool allow_tf32, bool transposed=False) -> Tensor");
  m.def(
      "grouped_gemm_weight_grad_(Tensor(a!) out, Tensor grad, Tensor a, Tensor offsets, Tensor? row_slot, int width,"
      " bool allow_tf32) -> ()");
  m.def("grouped_gemm_bias_grad(Tensor grad, Tensor offsets, ScalarType dtype) -> Tensor");

  m.def("combine(Tensor rows, Tensor? weights, Tensor row_slot, Tensor slot_row) -> Tensor");
  m.def(
      "combine_backward(Tensor grad_y, Tensor? rows, Tensor? weights, Tensor row_slot, Tensor slot_row, bool need_rows,"
      " bool need_weights) -> (Tensor grad_rows, Tensor grad_weights)");

  m.def(
      "moe_mlp(Tensor x, Tensor weights, Tensor w_in, Tensor w_out, Tensor? b_in, Tensor? b_out, Tensor offsets,"
      " Tensor row_slot, Tensor slot_row, int activation, bool gated, bool interleaved, float alpha, float limit,"
      " float up_offset, bool weight_on_input, bool allow_tf32, bool batch_invariant, bool keep_pre, Tensor? panels_in,"
      " Tensor? panels_out) -> (Tensor y, Tensor pre)");
  m.def(
      "moe_mlp_inference(Tensor x, Tensor weights, Tensor experts, Tensor w_in, Tensor w_out, Tensor? b_in,"
      " Tensor? b_out, int activation, bool gated, bool interleaved, float alpha, float limit, float up_offset,"
      " bool weight_on_input, bool allow_tf32, bool batch_invariant, Tensor? panels_in, Tensor? panels_out)"
      " -> Tensor");
  m.def(
      "moe_mlp_backward(Tensor grad_y, Tensor x, Tensor pre, Tensor weights, Tensor w_in, Tensor w_out, Tensor? b_out,"
      " Tensor offsets, Tensor row_slot, Tensor slot_row, int activation, bool gated, bool interleaved, float alpha,"
      " float limit, float up_offset, bool weight_on_input, bool allow_tf32, bool batch_invariant, ScalarType? "
      "b_in_dtype, bool need_x, bool need_weights, bool need_w_in, bool need_w_out, bool need_b_out)"
      " -> (Tensor grad_x, Tensor grad_weights, Tensor grad_w_in, Tensor grad_w_out, Tensor grad_b_in, Tensor "
      "grad_b_out)");
}
