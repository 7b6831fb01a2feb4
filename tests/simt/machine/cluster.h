// Blocks that run together: their turns, and the barrier of all their threads.
#pragma once

#include "machine/block.h"

namespace simt {

inline uint64_t multicasts = 0;  // of this process: boxes that went to several blocks

class Cluster {
 public:
  explicit Cluster(const GridOrder& order) : order_(order) {}

  void add(std::unique_ptr<Block> block) { blocks_.push_back(std::move(block)); }
  unsigned size() const { return unsigned(blocks_.size()); }
  Block& block(unsigned rank) { return *blocks_[rank]; }
  const GridOrder& order() const { return order_; }

  // Runs the blocks until none can go on: all have finished, or those left only spin or wait for another grid.
  void run(Random& random) {
    progressed_ = false;
    for (bool again = true; again && !finished();) {
      again = false;
      const uint32_t first = random.below(size());
      for (uint32_t i = 0; i < size(); ++i) {
        Block& block = *blocks_[(first + i) % size()];
        if (block.finished()) continue;
        Block::current = &block;
        blockIdx = block.index();
        block.run();
        again |= block.progressed() && size() > 1;
        progressed_ |= block.progressed();
        if (block.finished() && size() > 1) block.shared().fill();  // others do not find it any more
      }
      for (const auto& block : blocks_) again |= block->can_go_on();  // woken by one that came later
    }
    if (!finished() && !any([](const Block& block) { return block.spins() || block.waits_for_grids(); })) {
      Block& block = first_unfinished();
      throw Error("deadlock in block " + show(block.index()) + ": " + block.waiting());
    }
  }
  bool progressed() const { return progressed_; }  // in the last run
  bool finished() const {
    return !any([](const Block& block) { return !block.finished(); });
  }
  bool next_grid_may_start() const {
    return !any([](const Block& block) { return !block.next_grid_may_start(); });
  }
  void previous_grid_has_ended() {
    for (const auto& block : blocks_) block->previous_grid_has_ended();
  }
  Block& first_unfinished() {
    return **std::find_if(blocks_.begin(), blocks_.end(), [](const auto& block) { return !block->finished(); });
  }

  // For the thread that runs.
  void arrive(Where where) {
    Thread& self = Block::current->thread();
    if (self.cluster_phase) fail("cluster_arrive twice without a cluster_wait", where);
    self.cluster_phase = phase_;
    ++arrived_;
    turn();
  }
  void wait(Where where) {
    Thread& self = Block::current->thread();
    if (!self.cluster_phase) fail("cluster_wait without a cluster_arrive", where);
    while (*self.cluster_phase == phase_)
      Block::current->wait_in(waiting_[Block::current->rank()], "cluster_wait", where);
    self.cluster_phase.reset();
  }

  // After an arrival, or when a thread has ended: those that have count no more.
  void turn() {
    size_t threads = 0;
    for (const auto& block : blocks_) threads += block->running_threads();
    if (arrived_ == 0 || arrived_ < threads) return;
    arrived_ = 0;
    ++phase_;
    for (unsigned rank = 0; rank < size(); ++rank) blocks_[rank]->wake(waiting_[rank]);
  }

 private:
  template <class Is>
  bool any(const Is& is) const {
    return std::any_of(blocks_.begin(), blocks_.end(), [&](const auto& block) { return is(*block); });
  }

  const GridOrder& order_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::array<ThreadSet, 16> waiting_;  // of each block
  size_t arrived_ = 0;
  uint64_t phase_ = 0;
  bool progressed_ = false;
};

}  // namespace simt
