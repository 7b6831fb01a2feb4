// How the tensors of the grouped GEMMs become operands of a stage; shared by grouped_gemm and moe_mlp.
#pragma once

#include "ops/check.h"

namespace moe {

// Expert weights with some unit stride; the tensor keeps a copy alive where one had to be made.
inline Tensor with_unit_stride(const Tensor& w) {
  const bool unit = w.size(1) <= 1 || w.size(2) <= 1 || w.stride(1) == 1 || w.stride(2) == 1;
  return unit ? w : torch::stable::contiguous(w);
}

// What the operators take in place of the values of a weight [E, N, K]: panels as ExpertWeights describes them. The
// weight then gives shape and dtype alone; it has one element, expanded.
inline void expect_panels(const char* what, const OptionalTensor& panels, const Tensor& weight, const Tensor& rows) {
  if (!panels) return;
  const Dtype dtype = dtype_of(rows);
  const int64_t columns = panel_columns(dtype), values = panel_values(dtype);
  expect_type(what, *panels, rows.scalar_type());
  expect_type(what, weight, rows.scalar_type());
  expect_device(what, *panels, rows);
  expect_shape(what, *panels,
               {weight.size(0), (weight.size(1) + columns - 1) / columns, (weight.size(2) + values - 1) / values,
                columns, values});
  STD_TORCH_CHECK(panels->is_contiguous(), what, " is not contiguous");
}

inline ExpertWeights prepacked(const Tensor& panels) {
  return {.data = panels.data_ptr(),
          .dtype = dtype_of(panels),
          .expert_stride = panels.size(1) * panels.size(2) * panels.size(3) * panels.size(4),
          .prepacked = true};
}

// w [E, N, K] as the stage reads it; `transposed` swaps N and K, for the gradient of the input.
inline ExpertWeights expert_weights(const Tensor& w, bool transposed = false) {
  ExpertWeights out{.data = w.data_ptr(), .dtype = dtype_of(w), .expert_stride = w.stride(0)};
  const int n = transposed ? 2 : 1, k = transposed ? 1 : 2;
  out.n_stride = w.size(n) <= 1 ? 1 : w.stride(n);
  out.k_stride = w.size(k) <= 1 ? 1 : w.stride(k);
  return out;
}

inline ExpertWeights expert_weights(const Tensor& w, const OptionalTensor& panels) {
  return panels ? prepacked(*panels) : expert_weights(w);
}

// The dtype of an expert's weight or bias: that of the rows, or float32 beside 16 bits.
inline void expect_expert_type(const char* what, const Tensor& t, const Tensor& rows) {
  const auto type = t.scalar_type();
  const bool narrow = rows.scalar_type() == ScalarType::BFloat16 || rows.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(type == rows.scalar_type() || (type == ScalarType::Float && narrow), what, " has the wrong dtype");
}

inline void expect_bias(const char* what, const OptionalTensor& bias, const Tensor& rows, int64_t experts, int64_t n) {
  if (!bias) return;
  expect_shape(what, *bias, {experts, n});
  expect_expert_type(what, *bias, rows);
  expect_device(what, *bias, rows);
}

inline void expect_weights(const char* what, const Tensor& w, const Tensor& rows, int64_t n, int64_t k) {
  expect_shape(what, w, {-1, n, k});
  expect_expert_type(what, w, rows);
}

inline void expect_offsets(const char* what, const Tensor& offsets, int64_t num_experts) {
  expect_type(what, offsets, ScalarType::Int);
  expect_shape(what, offsets, {num_experts + 1});
}

inline void expect_row_slot(const char* what, const Tensor& row_slot, int64_t tokens) {
  expect_map(what, row_slot, {-1});
  STD_TORCH_CHECK(tokens > 0 || row_slot.size(0) == 0, what, " names rows of an empty operand");
}

// Whether w [E, N, K] lies in memory as [E, K, N], without gaps. So does its gradient then: whoever keeps it in another
// layout copies it, which takes longer than to compute it.
inline bool lies_transposed(const Tensor& w) {
  const int64_t n = w.size(1), k = w.size(2);
  return n > 1 && k > 1 && w.stride(1) == 1 && w.stride(2) == n && (w.size(0) < 2 || w.stride(0) == n * k);
}

// Room for the gradient of a weight [E, N, K]; transposed: in memory [E, K, N].
inline Tensor empty_weight_grad(int64_t experts, int64_t n, int64_t k, ScalarType type, bool transposed,
                                const Tensor& like) {
  const int64_t strides[] = {n * k, 1, n};
  return transposed ? empty_strided({experts, n, k}, strides, type, like) : empty({experts, n, k}, type, like);
}

inline GatheredRows rows_of(const Tensor& t) { return {.rows = matrix(t), .num_rows = t.size(0)}; }

inline GatheredRows gathered(const Tensor& t, const int32_t* row_slot, int64_t width, Vector scale = {}) {
  return {.rows = matrix(t), .row_slot = row_slot, .width = width, .num_rows = t.size(0), .scale = scale};
}

}  // namespace moe
