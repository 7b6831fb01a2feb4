// A CUDA device without torch, where the launch layer finds it: a stream of its own, plain allocations.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "stages/stages.h"

namespace moe {

struct Device {
  Device();
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  cudaStream_t stream() const { return stream_; }
  int arch() const;
  int processors() const;
  bool starts_early() const { return arch() == 90; }  // the stages are built as PTX of 8.0 and 9.0a
  void* scratch(int64_t bytes) const;

  void finish() const;  // waits for the kernels, throws what went wrong in them

 private:
  cudaStream_t stream_ = nullptr;
  mutable std::vector<void*> scratch_;
};

}  // namespace moe
