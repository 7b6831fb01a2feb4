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
  void (*body)(const void*);
  const void* arguments;
};

// Of this process; tests count them.
inline uint64_t launches = 0;

inline void run_blocks(const Grid& at, Random& random) {
  std::vector<uint64_t> order(uint64_t(at.grid.x) * at.grid.y * at.grid.z);
  std::iota(order.begin(), order.end(), 0);
  random.shuffle(order);
  std::vector<std::unique_ptr<Block>> spinning;
  const auto run = [](Block& block) {
    Block::current = &block;
    blockIdx = block.index();
    block.run();
    if (block.finished()) GuardedMemory::check_guards();
    return block.finished();
  };
  std::shared_ptr<GuardedMemory> shared;  // one for all blocks, but for those that spin
  bool progressed = true;
  for (size_t next = 0; next < order.size() || !spinning.empty();) {
    if (next == order.size() && !progressed)
      throw Error("deadlock: every block that is left spins, block " + show(spinning[0]->index()) + ": " +
                  spinning[0]->waiting());
    progressed = false;
    std::erase_if(spinning, [&](auto& block) {
      const bool finished = run(*block);
      progressed |= block->progressed();
      return finished;
    });
    if (next == order.size()) continue;
    const uint64_t i = order[next++];
    const uint3 index{unsigned(i % at.grid.x), unsigned(i / at.grid.x % at.grid.y),
                      unsigned(i / at.grid.x / at.grid.y)};
    if (shared.use_count() != 1) shared = std::make_shared<GuardedMemory>(at.shared_bytes, "shared memory");
    auto block = std::make_unique<Block>(at.block, index, shared, at.body, at.arguments, random.next());
    if (!run(*block)) spinning.push_back(std::move(block));
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
}

inline void run_grid(const Grid& at, const void* kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  Random random(seed() * 1000003 + launches++);
  gridDim = at.grid, blockDim = at.block;
  try {
    expect_launchable(at);
    run_blocks(at, random);
    Block::current = nullptr;
    GuardedMemory::check_guards();
  } catch (const Error& error) {
    Block::current = nullptr;
    throw std::runtime_error("moe_ops on the emulator: " + kernel_name(kernel) + ": " + error.what() + " (seed " +
                             std::to_string(seed()) + ", launch " + std::to_string(launches - 1) + ")");
  }
}

}  // namespace simt
