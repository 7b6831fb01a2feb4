// How a kernel is started and where its shared memory lies.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;  // of the struct that the kernel reads with arch::shared
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks along x that run together and reach each other's shared memory; sm_90
  bool early = false;    // may start before the grid ahead of it has ended: only code that waits, see arch/grid.cuh
};

// CUDA also keeps an error for whoever asks for the last one: it is taken away, or torch's next launch would report it
// as its own. An error that broke the context stays.
inline void check(cudaError_t status, std::source_location where = std::source_location::current()) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("moe_ops: CUDA error in ") + where.function_name() + ": " +
                           cudaGetErrorString(status));
}

// An empty grid starts nothing.
template <class... Params, class... Args>
void launch(const Launch& at, void (*kernel)(Params...), const Args&... args) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return;
  if (at.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared_bytes)));
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (at.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {at.cluster, 1, 1};
  }
  if (at.early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaLaunchConfig_t config{.gridDim = at.grid,
                                  .blockDim = at.block,
                                  .dynamicSmemBytes = at.shared_bytes,
                                  .stream = at.stream,
                                  .attrs = attributes,
                                  .numAttrs = count};
  check(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

// How many clusters of such a launch the current card holds at once; 0 where the driver cannot tell. Asked once a
// kernel and card, so that a kernel's blocks and clusters must have one size.
template <class... Params>
int resident_clusters(const Launch& at, void (*kernel)(Params...)) {
  static std::mutex mutex;
  static std::map<std::pair<int, void (*)(Params...)>, int> known;
  int device = 0, clusters = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  if (const auto found = known.find({device, kernel}); found != known.end()) return found->second;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(at.shared_bytes)));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {at.cluster, 1, 1};
  const cudaLaunchConfig_t config{.gridDim = dim3(at.cluster),
                                  .blockDim = at.block,
                                  .dynamicSmemBytes = at.shared_bytes,
                                  .attrs = &attribute,
                                  .numAttrs = 1};
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    clusters = 0;
  }
  return known[{device, kernel}] = clusters;
}

namespace arch {

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
}

}  // namespace arch
}  // namespace moe
