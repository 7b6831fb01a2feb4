// Run-time values to compile-time ones: each function returns a variant, std::visit forms the product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <variant>

#include "stages/params.h"

namespace moe {

template <int... values>
using Choice = std::variant<std::integral_constant<int, values>...>;

// The smallest of `values` (ascending) that is at least `value`; the last where there is none.
template <int... values>
Choice<values...> at_least(int64_t value) {
  Choice<values...> choice;
  bool found = false;
  ((choice = std::integral_constant<int, values>{}, found = value <= values) || ...);
  return choice;
}

using Flag = std::variant<std::false_type, std::true_type>;
inline Flag flag(bool value) { return value ? Flag(std::true_type{}) : Flag(std::false_type{}); }

template <class T>
struct Type {
  using type = T;
};

using FloatType = std::variant<Type<float>, Type<__nv_bfloat16>, Type<__half>>;

// The element type of a tensor; float64 has no CUDA kernels.
inline FloatType float_type(Dtype dtype, const char* what) {
  switch (dtype) {
    case Dtype::float32: return Type<float>{};
    case Dtype::bfloat16: return Type<__nv_bfloat16>{};
    case Dtype::float16: return Type<__half>{};
    case Dtype::float64: break;
  }
  throw std::invalid_argument(std::string(what) + ": float64 is supported on the CPU only");
}

}  // namespace moe
