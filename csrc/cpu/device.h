// The CPU as a device: found on the include path by ops/, which never says which device it is compiled for.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cpu/pages.h"
#include "stages/stages.h"

namespace moe {

inline constexpr const char* kDispatchKey = "CPU";

struct Device {
  explicit Device(const torch::stable::Tensor&) {}

  // Told of each output before it is written.
  static void allocated(void* data, int64_t bytes) { ask_for_huge_pages(data, bytes); }
};

}  // namespace moe
