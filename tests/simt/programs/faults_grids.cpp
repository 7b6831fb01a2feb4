// Grids of a stream that overlap, with one planted fault each, as in faults.cpp: `faults_grids NAME [mended]`.
#include <cstdio>
#include <string>

#include "cuda/arch/grid.cuh"
#include "cuda/arch/launch.cuh"
#include "device.h"
#include "planted.h"

namespace faults {

using namespace moe;

constexpr unsigned kBlocks = 40, kThreads = 128;  // more than run at once beside another grid
constexpr int kCount = kBlocks * kThreads;

struct Params {
  int *in, *middle, *other, *out;  // [kCount]
};

__device__ int own() { return int(blockIdx.x * kThreads + threadIdx.x); }
__device__ int neighbour() { return (own() + int(kThreads)) % kCount; }  // what another block has

// middle[i] = in[i] + 1; all blocks are there when the next grid begins.
__global__ void first(Params p) {
  arch::wait_for_previous_grid();
  arch::let_next_grid_start();
  p.middle[own()] = p.in[own()] + 1;
}

// out[i] = middle[i + kThreads] + 1
__global__ void last(Params p) {
  arch::wait_for_previous_grid();
  p.out[own()] = p.middle[neighbour()] + 1;
}

// As last, but reads what `first` has yet to write.
template <bool mended>
__global__ void read_before_wait(Params p) {
  if constexpr (mended) arch::wait_for_previous_grid();
  const int value = p.middle[neighbour()];
  if constexpr (!mended) arch::wait_for_previous_grid();
  p.out[own()] = value + 1;
}

// As last, and clears what `first` has yet to read.
template <bool mended>
__global__ void write_before_wait(Params p) {
  if constexpr (mended) arch::wait_for_previous_grid();
  p.in[neighbour()] = 0;
  if constexpr (!mended) arch::wait_for_previous_grid();
  p.out[own()] = p.middle[neighbour()] + 1;
}

// Between first and last, and of no use to either: were it over before `first`, `last` would not wait for that.
template <bool mended>
__global__ void middle_never_waits(Params p) {
  if constexpr (mended) arch::wait_for_previous_grid();
  arch::let_next_grid_start();
  p.other[own()] = 1;
}

// Threads that have nothing to do leave before they have waited.
template <bool mended>
__global__ void some_threads_wait(Params p) {
  if (!mended && threadIdx.x >= 64) return;
  arch::wait_for_previous_grid();
  p.other[own()] = 1;
}

using Kernel = void (*)(Params);

void run(Kernel kernel, bool is_between) {
  Device device;
  const auto ints = [&] { return static_cast<int*>(device.scratch(kCount * 4)); };
  const Params p{.in = ints(), .middle = ints(), .other = ints(), .out = ints()};
  for (int i = 0; i < kCount; ++i) p.in[i] = i;
  const Launch at{.grid = kBlocks, .block = kThreads, .early = true};
  launch(at, first, p);
  launch(at, kernel, p);
  if (is_between) launch(at, last, p);
  check(cudaStreamSynchronize(nullptr));
  for (int i = 0; i < kCount; ++i)
    if (p.out[i] != (i + int(kThreads)) % kCount + 2)
      throw std::runtime_error("wrong: out[" + std::to_string(i) + "] is " + std::to_string(p.out[i]));
  std::puts("right");
}

}  // namespace faults

int main(int argc, char** argv) {
  using namespace faults;
  return run_planted(argc, argv, [](const std::string& name, bool mended) {
    if (name == "read_before_wait") run(mended ? read_before_wait<true> : read_before_wait<false>, false);
    else if (name == "write_before_wait") run(mended ? write_before_wait<true> : write_before_wait<false>, false);
    else if (name == "middle_never_waits") run(mended ? middle_never_waits<true> : middle_never_waits<false>, true);
    else if (name == "some_threads_wait") run(mended ? some_threads_wait<true> : some_threads_wait<false>, true);
    else throw std::invalid_argument("no fault of this name: " + name);
  });
}
