// Tensor maps, checked and then encoded by the driver.
#include "cuda/launch/tensor_map.h"

#include <stdexcept>
#include <string>

namespace moe {

namespace {

arch::Element element_of(Dtype dtype) {
  return dtype == Dtype::bfloat16  ? arch::Element::bfloat16
         : dtype == Dtype::float16 ? arch::Element::float16
                                   : arch::Element::float32;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

}  // namespace

bool has_tensor_map(const BoxedTensor& tensor) {
  const int64_t bytes = bytes_of(tensor.dtype), most = int64_t(1) << 32;
  bool holds = tensor.dtype != Dtype::float64 && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
  for (int i = 0; i < tensor.rank; ++i) {
    holds = holds && tensor.sizes[size_t(i)] > 0 && tensor.sizes[size_t(i)] <= most;
    holds = holds && tensor.box[size_t(i)] > 0 && tensor.box[size_t(i)] <= 256;
  }
  for (int i = 0; i + 1 < tensor.rank; ++i) {
    const int64_t stride = tensor.strides[size_t(i)] * bytes;
    holds = holds && stride > 0 && stride % 16 == 0 && stride < int64_t(1) << 40;
  }
  const int64_t row = tensor.box[0] * bytes;
  return holds && row % 16 == 0 && (!tensor.swizzled || row <= 128);
}

arch::TensorMap tensor_map(const BoxedTensor& tensor, const char* what) {
  if (!has_tensor_map(tensor)) throw std::invalid_argument(std::string(what) + ": TMA cannot address this tensor");
  arch::TensorBoxes boxes{.data = tensor.data,
                          .element = element_of(tensor.dtype),
                          .rank = tensor.rank,
                          .sizes = {},
                          .stride_bytes = {},
                          .box = {},
                          .swizzled = tensor.swizzled};
  for (int i = 0; i < tensor.rank; ++i) {
    boxes.sizes[i] = uint64_t(tensor.sizes[size_t(i)]);
    boxes.box[i] = uint32_t(tensor.box[size_t(i)]);
    if (i > 0) boxes.stride_bytes[i - 1] = uint64_t(tensor.strides[size_t(i) - 1] * bytes_of(tensor.dtype));
  }
  arch::TensorMap map;
  if (const char* refused = arch::encode(boxes, map))
    throw std::runtime_error(std::string(what) + ": no tensor map: " + refused);
  return map;
}

}  // namespace moe
