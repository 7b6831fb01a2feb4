// mbarriers, named barriers and clusters: values handed from thread to thread; setmaxnreg beside them.
#include "check.h"
#include "cuda/arch/cluster.cuh"
#include "cuda/arch/grid.cuh"
#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/named_barrier.cuh"
#include "cuda/arch/registers.cuh"
#include "cuda/arch/warp.cuh"

namespace moe {
namespace {

constexpr int kSteps = 11, kStages = 3;

struct RingShared {
  alignas(16) int slots[kStages][32 * 4];
  arch::Barrier full[kStages], empty[kStages];
};

// A warp copies rows of 128 numbers into a ring, the other three warps take them out, warp w those of w % 3. Every
// block does so for itself.
__global__ __launch_bounds__(128) void ring(const int* in, int* out) {
  auto& shared = arch::shared<RingShared>();
  const int lane = arch::lane_id(), warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) shared.full[i].init(32), shared.empty[i].init(3);
    arch::fence_barrier_init();
  }
  arch::sync_block();
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const auto parity = uint32_t(step / kStages % 2);
    if (warp == 0) {
      shared.empty[stage].wait(parity ^ 1);
      arch::copy_async_16(&shared.slots[stage][4 * lane], in + 128 * step + 4 * lane);
      shared.full[stage].arrive_after_copies();
    } else {
      shared.full[stage].wait(parity);
      for (int i = lane; i < 128; i += 32)
        if (i % 3 == warp - 1) out[128 * (kSteps * int(blockIdx.x) + step) + i] = shared.slots[stage][(i + 64) % 128];
      arch::sync_warp();
      if (lane == 0) shared.empty[stage].arrive();
    }
  }
}

bool check_ring() {
  const Device device;
  constexpr unsigned blocks = 2;
  std::vector<int> in(128 * kSteps), expected(blocks * in.size());
  for (size_t i = 0; i < in.size(); ++i) in[i] = int(i * 7 + 1);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = in[i % in.size() / 128 * 128 + (i + 64) % 128];
  int* out = put(device, std::vector<int>(expected.size()));
  launch({.grid = dim3(blocks), .block = dim3(128), .shared_bytes = sizeof(RingShared), .stream = device.stream()},
         ring, put(device, in), out);
  return expect_equal("mbarriers of a ring", fetch(device, out, int(expected.size())), expected);
}

struct PlaceShared {
  int place;
};

// One warp writes without waiting for the readers' arrival until the next round; two warpgroups change registers.
__global__ __launch_bounds__(256) void hand_over(int* out) {
  auto& shared = arch::shared<PlaceShared>();
  if (threadIdx.x < 128) arch::give_registers<40>();
  else arch::take_registers<208>();
  for (int i = 0; i < 10; ++i) {
    if (threadIdx.x < 32) {
      if (i > 0) arch::sync_threads(2, 160);  // the readers have read
      if (threadIdx.x == 0) shared.place = i * i;
      arch::arrive_threads(1, 160);
    } else if (threadIdx.x >= 128) {
      arch::sync_threads(1, 160);
      out[i * 128 + int(threadIdx.x) - 128] = shared.place;
      if (i < 9) arch::arrive_threads(2, 160);
    }
  }
}

bool check_hand_over() {
  const Device device;
  int* out = put(device, std::vector<int>(1280));
  launch({.grid = dim3(1), .block = dim3(256), .shared_bytes = sizeof(PlaceShared), .stream = device.stream()},
         hand_over, out);
  std::vector<int> expected(1280);
  for (int i = 0; i < 1280; ++i) expected[size_t(i)] = i / 128 * (i / 128);
  return expect_equal("named barriers", fetch(device, out, 1280), expected);
}

struct TokenShared {
  int token;
  arch::Barrier come;
};

// A token goes round the blocks of a cluster, each adds its rank; then every block reads its neighbour's.
__global__ void pass_round(int* out) {
  auto& shared = arch::shared<TokenShared>();
  const uint32_t rank = arch::block_in_cluster(), blocks = arch::blocks_in_cluster();
  if (threadIdx.x == 0) {
    shared.come.init(1);
    arch::fence_barrier_init();
  }
  arch::cluster_arrive();
  arch::cluster_wait();
  if (threadIdx.x == 0) {
    if (rank > 0) shared.come.wait_for_cluster(0);
    else shared.token = 100;
    shared.token += int(rank);
    if (rank + 1 < blocks) {
      *arch::in_block(&shared.token, rank + 1) = shared.token;
      shared.come.arrive_at(rank + 1);
    }
  }
  arch::sync_cluster();
  if (threadIdx.x == 5) out[blockIdx.x] = *arch::in_block(&shared.token, (rank + 1) % blocks);
  arch::sync_cluster();  // no block goes while it is read
}

// What a block has read is written over only when the other one says that it has read it too.
__global__ void read_in_turn(int* out) {
  auto& shared = arch::shared<TokenShared>();
  const uint32_t rank = arch::block_in_cluster();
  if (threadIdx.x == 0) {
    shared.come.init(2);
    arch::fence_barrier_init();
  }
  arch::sync_cluster();
  for (int i = 0; i < 10; ++i) {
    if (threadIdx.x == 0) shared.token = 2 * i + int(rank);
    arch::sync_cluster();
    if (threadIdx.x < 2) {
      const int read = *arch::in_block(&shared.token, 1 - rank);
      if (threadIdx.x == 0) out[blockIdx.x * 10 + i] = read;
      // Of the two threads one tells each block; by a sum with what was read, so that it has been.
      arch::BarriersOfBlock(shared.come, (threadIdx.x + uint32_t(read)) % 2).arrive_at(shared.come);
      shared.come.wait(uint32_t(i % 2));
    }
  }
  arch::sync_cluster();
}

bool check_reads() {
  const Device device;
  int* out = put(device, std::vector<int>(40));
  launch({.grid = dim3(4),
          .block = dim3(32),
          .shared_bytes = sizeof(TokenShared),
          .stream = device.stream(),
          .cluster = 2},
         read_in_turn, out);
  std::vector<int> expected;
  for (int i = 0; i < 40; ++i) expected.push_back(2 * (i % 10) + 1 - i / 10 % 2);
  return expect_equal("arrivals at blocks of a cluster", fetch(device, out, 40), expected);
}

bool check_clusters() {
  const Device device;
  int* out = put(device, std::vector<int>(12));
  launch({.grid = dim3(12),
          .block = dim3(64),
          .shared_bytes = sizeof(TokenShared),
          .stream = device.stream(),
          .cluster = 4},
         pass_round, out);
  const std::vector<int> cluster{101, 103, 106, 100};
  std::vector<int> expected;
  for (int i = 0; i < 12; ++i) expected.push_back(cluster[size_t(i % 4)]);
  return expect_equal("clusters", fetch(device, out, 12), expected);
}

__global__ void add_one(int* numbers) {
  arch::let_next_grid_start();
  arch::wait_for_previous_grid();
  numbers[threadIdx.x] += 1;
}

bool check_early_grids() {
  const Device device;
  int* numbers = put(device, std::vector<int>(32));
  for (int i = 0; i < 5; ++i)
    launch({.grid = dim3(1), .block = dim3(32), .stream = device.stream(), .early = true}, add_one, numbers);
  return expect_equal("grids that start early", fetch(device, numbers, 32), std::vector<int>(32, 5));
}

}  // namespace
}  // namespace moe

int main() {
  bool right = moe::check_ring();
  right &= moe::check_hand_over();
  right &= moe::check_clusters();
  right &= moe::check_reads();
  right &= moe::check_early_grids();
  return right ? 0 : 1;
}
