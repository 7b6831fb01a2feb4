#include "device.h"

#include "cuda/arch/launch.cuh"

namespace moe {

namespace {

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

// It does not wait for the default stream, nor that for it: what is started elsewhere comes too early or too late.
Device::Device() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }

Device::~Device() {
  cudaStreamSynchronize(stream_);
  for (void* memory : scratch_) cudaFree(memory);
  cudaStreamDestroy(stream_);
}

int Device::arch() const {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

int Device::processors() const { return attribute(cudaDevAttrMultiProcessorCount); }

void* Device::scratch(int64_t bytes) const {
  void* memory = nullptr;
  check(cudaMalloc(&memory, size_t(bytes)));
  return scratch_.emplace_back(memory);
}

void Device::finish() const {
  check(cudaGetLastError());
  check(cudaStreamSynchronize(stream_));
}

}  // namespace moe
