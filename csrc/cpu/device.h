// The CPU as a device: found on the include path by ops/, which never says which device it is compiled for.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "stages/stages.h"

namespace moe {

inline constexpr const char* kDispatchKey = "CPU";

struct Device {
  explicit Device(const torch::stable::Tensor&) {}

  // Told of each output before it is written. Fresh memory comes in pages of 4 KiB, and the faults of their first use
  // cost more than the writing; large outputs ask for huge pages, as THP_MEM_ALLOC_ENABLE=1 makes torch do for all.
  static void allocated(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t kHugePage = 2 << 20;
    const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) & ~(kHugePage - 1);
    const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) & ~(kHugePage - 1);
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // where refused, 4 KiB do
#endif
  }
};

}  // namespace moe
