// The emulated card as a device: CPU tensors, so it stands where the CPU's kernels stand.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <list>

#include "machine/grid.h"
#include "stages/stages.h"

struct CUstream_st;
namespace torch::stable {
class Tensor;
}

namespace moe {

inline constexpr const char* kDispatchKey = "CPU";

struct Device {
  Device() = default;  // for programs without torch
  explicit Device(const torch::stable::Tensor&) {}
  // What was launched has ended: torch reads CPU tensors at once. Throws what a kernel did wrong.
  ~Device() noexcept(false) {
    if (std::uncaught_exceptions() > failures_) simt::forget_grids();
    else simt::finish_grids();
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Poisoned, so that an output that is not wholly written is seen.
  static void allocated(void* data, int64_t bytes) {
    if (bytes > 0) std::memset(data, simt::poison(), size_t(bytes));
  }

  CUstream_st* stream() const { return nullptr; }
  int arch() const {  // MOE_OPS_SIMT_ARCH
    const char* text = std::getenv("MOE_OPS_SIMT_ARCH");
    return text ? std::atoi(text) : 80;
  }
  int processors() const { return simt::kProcessors; }
  bool starts_early() const { return arch() == 90; }
  void* scratch(int64_t bytes) const { return scratch_.emplace_back(size_t(bytes), "scratch").data(); }

 private:
  int failures_ = std::uncaught_exceptions();
  mutable std::list<simt::GuardedMemory> scratch_;
};

}  // namespace moe
