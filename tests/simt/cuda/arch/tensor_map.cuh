// What TMA is told of a tensor, kept as it was told.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moe::arch {

enum class Element { bfloat16, float16, float32 };

struct TensorBoxes {
  const void* data;
  Element element;
  int rank;
  uint64_t sizes[3];
  uint64_t stride_bytes[2];
  uint32_t box[3];
  bool swizzled;

  int64_t element_bytes() const { return element == Element::float32 ? 4 : 2; }
  int64_t box_bytes() const { return element_bytes() * box[0] * box[1] * (rank == 3 ? box[2] : 1); }
};

struct alignas(16) TensorMap {
  TensorBoxes boxes;
};

// What cuTensorMapEncodeTiled asks for.
inline const char* encode(const TensorBoxes& boxes, TensorMap& map) {
  const int64_t row = boxes.element_bytes() * boxes.box[0];
  bool right = boxes.data && reinterpret_cast<uintptr_t>(boxes.data) % 16 == 0 && row % 16 == 0;
  right = right && (boxes.rank == 2 || boxes.rank == 3) && (!boxes.swizzled || row <= 128);
  for (int i = 0; right && i < boxes.rank; ++i) {
    right = boxes.sizes[i] > 0 && boxes.sizes[i] <= uint64_t(1) << 32 && boxes.box[i] > 0 && boxes.box[i] <= 256;
    if (i > 0) right = right && boxes.stride_bytes[i - 1] % 16 == 0 && boxes.stride_bytes[i - 1] < uint64_t(1) << 40;
  }
  map.boxes = boxes;
  return right ? nullptr : "cuTensorMapEncodeTiled would refuse it";
}

}  // namespace moe::arch
