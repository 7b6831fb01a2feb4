// What the operators check before they touch memory, and how a tensor becomes a stage's struct. Python catches users'
// mistakes with better texts; these checks keep a wrong call from leaving its buffers. moe_mlp_inference is called
// before Python has looked: it must refuse whatever Python refuses (tests/test_errors.py).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "device.h"
#include "stages/params.h"

namespace moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Double: return Dtype::float64;
    default: STD_TORCH_CHECK(false, "expected a tensor of float32, bfloat16, float16 or float64");
  }
}

inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Checks the shape; -1 stands for any size.
inline void expect_shape(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool ok = t.dim() == int64_t(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) ok = ok && (size < 0 || t.size(dim) == size), ++dim;
  STD_TORCH_CHECK(ok, what, " has the wrong shape");
}

inline void expect_type(const char* what, const Tensor& t, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, what, " has the wrong dtype");
}

inline void expect_device(const char* what, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.device() == like.device(), what, " is on another device");
}

// Ids of experts; returns whether they are int64. An int32 numbers their slots.
inline bool expect_ids(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) {
  expect_shape(what, t, shape);
  STD_TORCH_CHECK(t.numel() <= std::numeric_limits<int32_t>::max(), what, " must have fewer than 2^31 elements");
  if (t.scalar_type() == ScalarType::Long) return true;
  expect_type(what, t, ScalarType::Int);
  return false;
}

// row_slot or slot_row: int32, and few enough elements that an int32 numbers them.
inline void expect_map(const char* what, const Tensor& t, std::initializer_list<int64_t> shape) {
  expect_shape(what, t, shape);
  expect_type(what, t, ScalarType::Int);
  STD_TORCH_CHECK(t.numel() <= std::numeric_limits<int32_t>::max(), what, " must have fewer than 2^31 elements");
}

// By the call that costs least: the dispatcher's takes longer than routing one token.
inline Tensor empty_strided(std::initializer_list<int64_t> shape, const int64_t* strides, ScalarType type,
                            const Tensor& like) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, device_index, &made));
  Tensor out(made);
  Device::allocated(out.data_ptr(), out.numel() * int64_t(out.element_size()));
  return out;
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Tensor& like) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0; stride *= std::max<int64_t>(shape.begin()[dim], 1)) strides[dim] = stride;
  return empty_strided(shape, strides.data(), type, like);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor as_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(as_contiguous(*t)) : std::nullopt;
}

// A 2-D tensor whose rows are contiguous; a copy is made only where they are not.
inline Tensor with_unit_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

inline Matrix matrix(const Tensor& t) { return {.data = t.data_ptr(), .dtype = dtype_of(t), .stride = t.stride(0)}; }

inline Vector vector(const OptionalTensor& t) {
  return t ? Vector{.data = t->data_ptr(), .dtype = dtype_of(*t)} : Vector{};
}

// What a checked int32 tensor holds: ids, offsets, a map.
inline int32_t* int32s(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

template <class T>
const T* data(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// Registers one operator for the device this file is compiled for.
class Register {
 public:
  Register(const char* name, void (*boxed)(StableIValue*, uint64_t, uint64_t))
      : library_(torch::stable::detail::StableLibrary::Kind::IMPL, "moe_ops", kDispatchKey, __FILE__, __LINE__) {
    library_.impl(name, boxed);
  }

 private:
  torch::stable::detail::StableLibrary library_;
};

}  // namespace moe
