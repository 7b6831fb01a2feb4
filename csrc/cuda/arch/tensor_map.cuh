// sm_90: what the driver tells TMA of a tensor: where it lies and which boxes of it are copied.
// https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moe::arch {

// Goes to a kernel by value, as const __grid_constant__.
struct alignas(128) TensorMap {
  unsigned char bytes[128];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

enum class Element { bfloat16, float16, float32 };

// Dimensions count from the contiguous one.
struct TensorBoxes {
  const void* data;
  Element element;
  int rank;                  // 2 or 3
  uint64_t sizes[3];         // in elements
  uint64_t stride_bytes[2];  // of dimensions 1 and 2
  uint32_t box[3];           // in elements
  bool swizzled;             // 16-byte chunk c of a 128-byte row r of the box lies in chunk c ^ r % 8; else as it is
};

// Null, or why there is no map. Elements outside the tensor are loaded as zeros and are not stored.
inline const char* encode(const TensorBoxes& boxes, TensorMap& map) {
  // Asked for, so that nothing is linked with the driver, and once.
  static const auto encode_tiled = []() -> decltype(&cuTensorMapEncodeTiled) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status == cudaSuccess && found == cudaDriverEntryPointSuccess)
      return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    cudaGetLastError();
    return nullptr;
  }();
  if (!encode_tiled) return "the driver has no cuTensorMapEncodeTiled";
  constexpr CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                           CU_TENSOR_MAP_DATA_TYPE_FLOAT32};
  const cuuint32_t every_element[3] = {1, 1, 1};
  const CUresult result = encode_tiled(
      reinterpret_cast<CUtensorMap*>(&map), types[int(boxes.element)], cuuint32_t(boxes.rank),
      const_cast<void*>(boxes.data), reinterpret_cast<const cuuint64_t*>(boxes.sizes),
      reinterpret_cast<const cuuint64_t*>(boxes.stride_bytes), boxes.box, every_element, CU_TENSOR_MAP_INTERLEAVE_NONE,
      boxes.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused it";
}

}  // namespace moe::arch
