// The stages as C functions for Python's ctypes: memory of the device, and each stage, called with the struct that
// Python filled. What fails is said in a text; null means that nothing did.
#include "device.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "cuda/arch/launch.cuh"

namespace moe {
namespace {

template <class Work>
const char* text_of_failure(Work work) {
  thread_local std::string text;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

template <class Params>
const char* run(void (*stage)(const Params&, const Device&), const Params& params, int64_t bytes) {
  return text_of_failure([&] {
    if (bytes != sizeof(Params)) throw std::invalid_argument("the struct is not the one of stages/params.h");
    const Device device;
    stage(params, device);
    device.finish();
  });
}

}  // namespace
}  // namespace moe

extern "C" {

const char* allocate(int64_t bytes, void** memory) {
  return moe::text_of_failure([&] { moe::check(cudaMalloc(memory, size_t(bytes))); });
}

const char* release(void* memory) {
  return moe::text_of_failure([&] { moe::check(cudaFree(memory)); });
}

const char* copy(void* to, const void* from, int64_t bytes) {
  return moe::text_of_failure([&] { moe::check(cudaMemcpy(to, from, size_t(bytes), cudaMemcpyDefault)); });
}

// The file of the runtime that serves these calls.
const char* runtime() {
  Dl_info found{};
  dladdr(reinterpret_cast<const void*>(&cudaLaunchKernelExC), &found);
  return found.dli_fname;
}

const char* route(const moe::RouteParams* p, int64_t bytes) { return moe::run(moe::route, *p, bytes); }
const char* route_backward(const moe::RouteBackwardParams* p, int64_t bytes) {
  return moe::run(moe::route_backward, *p, bytes);
}
const char* plan(const moe::PlanParams* p, int64_t bytes) { return moe::run(moe::plan, *p, bytes); }
const char* permute(const moe::PermuteParams* p, int64_t bytes) { return moe::run(moe::permute, *p, bytes); }
const char* combine(const moe::CombineParams* p, int64_t bytes) { return moe::run(moe::combine, *p, bytes); }
const char* combine_backward(const moe::CombineBackwardParams* p, int64_t bytes) {
  return moe::run(moe::combine_backward, *p, bytes);
}
const char* grouped_gemm(const moe::GroupedGemmParams* p, int64_t bytes) {
  return moe::run(moe::grouped_gemm, *p, bytes);
}
const char* grouped_gemm_weight_grad(const moe::WeightGradParams* p, int64_t bytes) {
  return moe::run(moe::grouped_gemm_weight_grad, *p, bytes);
}
const char* grouped_gemm_bias_grad(const moe::BiasGradParams* p, int64_t bytes) {
  return moe::run(moe::grouped_gemm_bias_grad, *p, bytes);
}
}
