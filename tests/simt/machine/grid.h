// Grids on one OS thread. A grid's blocks run one after another in random order; one that only spins is left until
// others have run, so that it may wait for any block. The last grid that was launched runs when the host waits or
// launches the next one. One that may start early begins as soon as it ever may: its first blocks come when all of the
// grid ahead have let it start or ended, and get as far as they can before the last blocks of that grid go on.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <memory>
#include <mutex>
#include <numeric>

#include "machine/schedule.h"

namespace simt {

struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster;
  bool early;
  void (*body)(const void*);
  std::shared_ptr<const void> arguments;
  const void* kernel;
};

// Of this process; tests count them.
inline uint64_t launches = 0, early_launches = 0;

inline uint3 index_of(uint64_t i, dim3 grid) {
  return {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
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

class RunningGrid {
 public:
  explicit RunningGrid(const Grid& at)
      : at_(at), order_{.early = at.early}, number_(launches++), random_(seed() * 1000003 + number_) {
    early_launches += at.early;
    run([&] {
      expect_launchable();
      clusters_.resize(uint64_t(at.grid.x) * at.grid.y * at.grid.z / at.cluster);
      std::iota(clusters_.begin(), clusters_.end(), 0);
      random_.shuffle(clusters_);
      shared_.resize(at.cluster);
    });
  }

  // The blocks that start before the grid ahead has ended: those that have room beside it.
  void begin_early() {
    order_.previous_ended = false;
    run([&] { run_clusters(std::min(clusters_.size(), clusters_at_once())); });
  }
  void previous_has_ended() {
    order_.previous_ended = true;
    for (auto& cluster : begun_) cluster->previous_grid_has_ended();
  }

  // All blocks end but the last, which stand still where they let the next grid start; whether all of them do.
  bool run_until_next_may_start() {
    run([&] {
      const size_t last = std::min(clusters_.size(), clusters_at_once());
      if (next_ < clusters_.size() - last) run_clusters(clusters_.size() - last);
      order_.next_begins = true;
      run_clusters(clusters_.size());
      order_.next_begins = false;
    });
    return std::all_of(begun_.begin(), begun_.end(), [](const auto& each) { return each->next_grid_may_start(); });
  }

  void finish() {
    run([&] {
      run_clusters(clusters_.size());
      if (!begun_.empty()) {
        const Block& block = begun_[0]->first_unfinished();
        throw Error("deadlock: every block that is left spins, block " + show(block.index()) + ": " + block.waiting());
      }
      GuardedMemory::check_guards();
    });
  }

 private:
  template <class Work>
  void run(const Work& work) {
    gridDim = at_.grid, blockDim = at_.block;
    try {
      work();
      Block::current = nullptr;
    } catch (const Error& error) {
      Block::current = nullptr;
      throw std::runtime_error("moe_ops on the emulator: " + kernel_name(at_.kernel) + ": " + error.what() + " (seed " +
                               std::to_string(seed()) + ", launch " + std::to_string(number_) + ")");
    }
  }

  void expect_launchable() const {
    const auto expect = [](bool holds, const char* what) {
      if (!holds) throw Error(what);
    };
    constexpr size_t most_shared = 227 << 10;
    expect(at_.grid.x < 1u << 31 && at_.grid.y < 1u << 16 && at_.grid.z < 1u << 16, "the grid is too large");
    expect(threads_of_block() > 0 && threads_of_block() <= 1024 && at_.block.z <= 64,
           "a block of no or too many threads");
    expect(at_.shared_bytes <= most_shared, "too much shared memory");
    expect(at_.cluster >= 1 && at_.cluster <= 8 && at_.grid.x % at_.cluster == 0,
           "a grid of no whole clusters of 1 to 8");
  }

  uint64_t threads_of_block() const { return uint64_t(at_.block.x) * at_.block.y * at_.block.z; }

  // Of a grid that overlaps another: not many, as every thread has a stack.
  size_t clusters_at_once() const { return std::max<size_t>(2048 / (threads_of_block() * at_.cluster), 1); }

  // Until so many have begun and none of them can go on.
  void run_clusters(size_t count) {
    for (bool progressed = true; next_ < count || (progressed && !begun_.empty());) {
      progressed = false;
      std::erase_if(begun_, [&](auto& cluster) {
        const bool finished = run_cluster(*cluster);
        progressed |= cluster->progressed();
        return finished;
      });
      if (next_ >= count) continue;
      auto cluster = begin(clusters_[next_++] * at_.cluster);
      if (!run_cluster(*cluster)) begun_.push_back(std::move(cluster));
      progressed = true;
    }
  }

  bool run_cluster(Cluster& cluster) {
    cluster.run(random_);
    if (cluster.finished()) GuardedMemory::check_guards();
    return cluster.finished();
  }

  std::unique_ptr<Cluster> begin(uint64_t first) {
    auto cluster = std::make_unique<Cluster>(order_);
    for (unsigned rank = 0; rank < at_.cluster; ++rank) {
      auto& own = shared_[rank];
      if (own.use_count() != 1) own = std::make_shared<GuardedMemory>(at_.shared_bytes, "shared memory");
      cluster->add(std::make_unique<Block>(*cluster, rank, at_.block, index_of(first + rank, at_.grid), own, at_.body,
                                           at_.arguments.get(), random_.next()));
    }
    return cluster;
  }

  Grid at_;
  GridOrder order_;
  uint64_t number_;
  Random random_;
  std::vector<uint64_t> clusters_;  // in the order in which they begin
  size_t next_ = 0;
  std::vector<std::shared_ptr<GuardedMemory>> shared_;  // one for all clusters, but for those that have not finished
  std::vector<std::unique_ptr<Cluster>> begun_;         // and not finished
};

// The stream of an OS thread: the last grid that was launched, which has not ended.
inline thread_local std::unique_ptr<RunningGrid> last_grid;
inline std::mutex one_at_a_time;

inline void launch_grid(const Grid& at) {
  const std::lock_guard lock(one_at_a_time);
  auto next = std::make_unique<RunningGrid>(at);
  if (const auto previous = std::move(last_grid)) {
    if (at.early && previous->run_until_next_may_start()) next->begin_early();
    previous->finish();
    next->previous_has_ended();
  }
  last_grid = std::move(next);
}

// What the host waits for.
inline void finish_grids() {
  const std::lock_guard lock(one_at_a_time);
  if (const auto last = std::move(last_grid)) last->finish();
}

// Where something else has failed.
inline void forget_grids() {
  const std::lock_guard lock(one_at_a_time);
  last_grid.reset();
}

}  // namespace simt
