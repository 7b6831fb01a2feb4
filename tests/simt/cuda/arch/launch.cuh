// How a kernel is started on the emulator and where its shared memory lies.
#pragma once

#include <cuda_runtime.h>

#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>

#include "machine/grid.h"

namespace moe {

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;
  bool early = false;
};

inline void check(cudaError_t status, std::source_location where = std::source_location::current()) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("moe_ops: CUDA error in ") + where.function_name());
}

template <class... Params, class... Args>
void launch(const Launch& at, void (*kernel)(Params...), const Args&... args) {
  if (at.grid.x == 0 || at.grid.y == 0 || at.grid.z == 0) return;
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> params;
  };
  const Call call{kernel, std::tuple<Params...>(Params(args)...)};
  simt::launch_grid({.grid = at.grid,
                     .block = at.block,
                     .shared_bytes = at.shared_bytes,
                     .cluster = at.cluster,
                     .early = at.early,
                     .body =
                         [](const void* of) {
                           const auto& call = *static_cast<const Call*>(of);
                           std::apply(call.kernel, call.params);
                         },
                     .arguments = std::make_shared<const Call>(call),
                     .kernel = reinterpret_cast<const void*>(kernel)});
}

// A block on each processor.
template <class... Params>
int resident_clusters(const Launch& at, void (*)(Params...)) {
  return int(simt::kProcessors / at.cluster);
}

namespace arch {

template <class T>
T& shared(simt::Where where = simt::Where::current()) {
  simt::GuardedMemory& memory = simt::Block::current->shared();
  if (sizeof(T) > memory.bytes())
    simt::fail("shared memory of " + std::to_string(sizeof(T)) + " bytes is read, " + std::to_string(memory.bytes()) +
                   " were launched",
               where);
  return *reinterpret_cast<T*>(memory.data());
}

}  // namespace arch
}  // namespace moe
