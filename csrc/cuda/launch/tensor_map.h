// What TMA is told of a tensor, made by the host for one launch.
#pragma once

#include <array>

#include "cuda/arch/tensor_map.cuh"
#include "stages/params.h"

namespace moe {

// A tensor and the boxes that are copied of it; dimensions count from the contiguous one, those past the rank are not
// read. Elements outside the tensor are loaded as zeros and are not stored.
struct BoxedTensor {
  const void* data;
  Dtype dtype;
  int rank;  // 2 or 3
  std::array<int64_t, 3> sizes;
  std::array<int64_t, 2> strides;  // of dimensions 1 and 2, in elements
  std::array<int, 3> box;
  bool swizzled = true;  // box[0] is then at most 128 bytes
};

// Whether TMA can address it: see the alignments of cuTensorMapEncodeTiled.
// https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
bool has_tensor_map(const BoxedTensor& tensor);

// `what` names the operator in errors.
arch::TensorMap tensor_map(const BoxedTensor& tensor, const char* what);

}  // namespace moe
