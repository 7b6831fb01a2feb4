// A CUDA device: found on the include path by ops/, which never says which device it is compiled for. The launch layer
// reads it too, so torch stays out of it.
#pragma once

#include <cstdint>
#include <memory>

#include "stages/stages.h"

struct CUstream_st;
namespace torch::stable {
class Tensor;
}

namespace moe {

inline constexpr const char* kDispatchKey = "CUDA";

// The device of a tensor, made current while this object lives, and torch's current stream there.
struct Device {
  explicit Device(const torch::stable::Tensor& like);
  ~Device();

  static void allocated(void*, int64_t) {}

  CUstream_st* stream() const;
  int arch() const;                    // compute capability: 80, 90
  int processors() const;              // streaming multiprocessors
  bool starts_early() const;           // whether kernels may be launched early, see arch/launch.cuh
  void* scratch(int64_t bytes) const;  // device memory from torch's allocator, aligned to 256 bytes, in stream order:
                                       // for the kernels launched while this object lives
 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace moe
