// A grid on one OS thread: its blocks one after another in random order. A block that only spins is left until others
// have run, so that it may wait for any block.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <mutex>
#include <numeric>

#include "machine/schedule.h"

namespace simt {

struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  void (*body)(const void*);
  const void* arguments;
};

// Of this process; tests count them.
inline uint64_t launches = 0;

inline uint3 index_of(uint64_t i, dim3 grid) {
  return {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
}

inline void run_clusters(const Grid& at, Random& random) {
  std::vector<uint64_t> order(uint64_t(at.grid.x) * at.grid.y * at.grid.z / at.cluster);
  std::iota(order.begin(), order.end(), 0);
  random.shuffle(order);
  std::vector<std::unique_ptr<Cluster>> spinning;
  const auto run = [&](Cluster& cluster) {
    cluster.run(random);
    if (cluster.finished()) GuardedMemory::check_guards();
    return cluster.finished();
  };
  std::vector<std::shared_ptr<GuardedMemory>> shared(at.cluster);  // one for all clusters, but for those that spin
  bool progressed = true;
  for (size_t next = 0; next < order.size() || !spinning.empty();) {
    if (next == order.size() && !progressed) {
      const Block& block = spinning[0]->first_unfinished();
      throw Error("deadlock: every block that is left spins, block " + show(block.index()) + ": " + block.waiting());
    }
    progressed = false;
    std::erase_if(spinning, [&](auto& cluster) {
      const bool finished = run(*cluster);
      progressed |= cluster->progressed();
      return finished;
    });
    if (next == order.size()) continue;
    const uint64_t first = order[next++] * at.cluster;
    auto cluster = std::make_unique<Cluster>();
    for (unsigned rank = 0; rank < at.cluster; ++rank) {
      auto& own = shared[rank];
      if (own.use_count() != 1) own = std::make_shared<GuardedMemory>(at.shared_bytes, "shared memory");
      cluster->add(std::make_unique<Block>(*cluster, rank, at.block, index_of(first + rank, at.grid), own, at.body,
                                           at.arguments, random.next()));
    }
    if (!run(*cluster)) spinning.push_back(std::move(cluster));
    progressed = true;
  }
}

inline std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel)
    return "a kernel (link with -rdynamic for its name)";
  char* text = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  std::string name = text ? text : info.dli_sname;
  std::free(text);
  return name.substr(0, name.find('('));
}

inline void expect_launchable(const Grid& at) {
  const auto expect = [](bool holds, const char* what) {
    if (!holds) throw Error(what);
  };
  constexpr size_t most_shared = 227 << 10;
  const uint64_t threads = uint64_t(at.block.x) * at.block.y * at.block.z;
  expect(at.grid.x < 1u << 31 && at.grid.y < 1u << 16 && at.grid.z < 1u << 16, "the grid is too large");
  expect(threads > 0 && threads <= 1024 && at.block.z <= 64, "a block of no or too many threads");
  expect(at.shared_bytes <= most_shared, "too much shared memory");
  expect(at.cluster >= 1 && at.cluster <= 8 && at.grid.x % at.cluster == 0, "a grid of no whole clusters of 1 to 8");
}

inline void run_grid(const Grid& at, const void* kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Random random(seed() * 1000003 + launches++);
  gridDim = at.grid, blockDim = at.block;
  try {
    expect_launchable(at);
    run_clusters(at, random);
    Block::current = nullptr;
    GuardedMemory::check_guards();
  } catch (const Error& error) {
    Block::current = nullptr;
    throw std::runtime_error("moe_ops on the emulator: " + kernel_name(kernel) + ": " + error.what() + " (seed " +
                             std::to_string(seed()) + ", launch " + std::to_string(launches - 1) + ")");
  }
}

}  // namespace simt
