// The CPU as a device: found on the include path by ops/, which never says which device it is compiled for.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "stages/stages.h"

namespace moe {

inline constexpr const char* kDispatchKey = "CPU";

struct Device {
  explicit Device(const torch::stable::Tensor&) {}
};

}  // namespace moe
