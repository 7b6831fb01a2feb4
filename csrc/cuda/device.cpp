// A CUDA device through torch's stable ABI: its guard, its current stream and its allocator. Made for every operator
// call, so it costs no more than a few look-ups, and nothing in it waits for the device or is unsafe in graph capture.
#include "device.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/arch/launch.cuh"
#include "cuda/architectures.h"

namespace moe {
namespace {

using torch::stable::accelerator::DeviceGuard;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

struct Facts {
  int arch, processors;
  bool starts_early;
};

std::string environment(const char* name) {
  const char* text = std::getenv(name);
  return text ? text : "";
}

// Drivers from 12.3 on capture such launches in graphs. CUDA's own variables make a driver compile PTX though there is
// machine code, and that may be sm_80's; MOE_OPS_CUDA_EARLY=0 is for measurements.
bool starts_early(int arch) {
  const std::string wanted = environment("MOE_OPS_CUDA_EARLY");
  if (wanted != "" && wanted != "0" && wanted != "1")
    throw std::runtime_error("moe_ops: MOE_OPS_CUDA_EARLY must be 0 or 1, got '" + wanted + "'");
  const auto is_set = [](const char* name) {
    const std::string text = environment(name);
    return text != "" && text != "0";
  };
  int driver = 0;
  check(cudaDriverGetVersion(&driver));
  return driver >= 12030 && may_start_early(MOE_BUILT_FOR_CUDA, arch) && wanted != "0" &&
         !is_set("CUDA_FORCE_PTX_JIT") && !is_set("CUDA_FORCE_JIT");
}

Facts read_facts(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  const Facts facts{.arch = 10 * major + minor,
                    .processors = attribute(cudaDevAttrMultiProcessorCount, device),
                    .starts_early = starts_early(10 * major + minor)};
  if (!has_kernels(MOE_BUILT_FOR_CUDA, facts.arch))
    throw std::runtime_error("moe_ops: no kernels for cuda:" + std::to_string(device) +
                             ", which has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                             ": this build is for " MOE_BUILT_FOR_CUDA
                             " (TORCH_CUDA_ARCH_LIST chooses, 8.0 is the least)");
  return facts;
}

// Read once per device: the driver's answers do not change.
Facts facts_of(int device) {
  static std::mutex mutex;
  static std::map<int, Facts> known;
  const std::lock_guard lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) found = known.emplace(device, read_facts(device)).first;
  return found->second;
}

}  // namespace

struct Device::State {
  explicit State(int32_t index) : index(index), facts(facts_of(index)) {
    int current = 0;
    check(cudaGetDevice(&current));
    if (current != index) guard.emplace(index);
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

  int32_t index;
  Facts facts;
  std::optional<DeviceGuard> guard;
  cudaStream_t stream;
  std::vector<torch::stable::Tensor> scratch;
};

Device::Device(const torch::stable::Tensor& like) : state_(std::make_unique<State>(like.get_device_index())) {}

Device::~Device() = default;

cudaStream_t Device::stream() const { return state_->stream; }

int Device::arch() const { return state_->facts.arch; }

int Device::processors() const { return state_->facts.processors; }

bool Device::starts_early() const { return state_->facts.starts_early; }

// Given back when this object dies: whoever gets it next is behind us in the same stream.
void* Device::scratch(int64_t bytes) const {
  constexpr int64_t stride = 1;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                         aoti_torch_device_type_cuda(), state_->index, &made));
  return state_->scratch.emplace_back(made).data_ptr();
}

}  // namespace moe
