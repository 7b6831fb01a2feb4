// Barriers that count threads and bytes: what copies bring is seen when the phase completes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/arch/copy_async.cuh"
#include "machine/schedule.h"

namespace moe::arch {

struct Barrier {
  uint64_t state;  // kInitialised, so that one that was never made, or was written over, is noticed

  void init(uint32_t count, simt::Where where = simt::Where::current()) {
    simt::check_access("a barrier", this, 8, 8, where);
    if (!simt::Block::current->shared().holds(this, 8)) simt::fail("a barrier outside shared memory", where);
    if (count == 0 || count >= 1u << 20) simt::fail("a barrier of no or too many arrivals", where);
    state = kInitialised;
    simt::Block::current->mbarriers()[shared_address(this)] = {.expected = count, .pending = count};
  }

  void arrive(simt::Where where = simt::Where::current()) {
    arrive_in(*simt::Block::current, where);
    sometimes_pass("Barrier::arrive", where);
  }

  void arrive_at(uint32_t block, simt::Where where = simt::Where::current()) {
    if (block >= simt::Block::current->cluster().size())
      simt::fail("arrive_at block " + std::to_string(block) + " of a cluster of fewer", where);
    arrive_in(simt::Block::current->cluster().block(block), where);
    sometimes_pass("Barrier::arrive_at", where);
  }

  void arrive_expect_bytes(uint32_t bytes, simt::Where where = simt::Where::current()) {
    machine(*simt::Block::current, where).bytes += bytes;
    arrive_in(*simt::Block::current, where);
  }

  void arrive_after_copies(simt::Where where = simt::Where::current()) {
    simt::Block& block = *simt::Block::current;
    machine(block, where);
    simt::Thread& thread = block.thread();
    block.later("copy_async", [this, &block, &thread, begun = thread.copies.begun(), where] {
      thread.copies.land(begun);
      arrive_in(block, where);
    });
  }

  bool try_wait(uint32_t parity, simt::Where where = simt::Where::current()) {
    if (machine(*simt::Block::current, where).parity != parity) return true;
    simt::Block::current->spin(where);
    return false;
  }

  void wait(uint32_t parity, simt::Where where = simt::Where::current()) {
    sometimes_pass("Barrier::wait", where);
    for (;;) {
      simt::MBarrier& barrier = machine(*simt::Block::current, where);
      if (barrier.parity != parity) return;
      simt::Block::current->wait_in(barrier.waiting, "Barrier::wait", where);
    }
  }
  void wait_for_cluster(uint32_t parity, simt::Where where = simt::Where::current()) { wait(parity, where); }

  // Bytes of a copy to this place of a block, and what it does when they are seen.
  void land(simt::Block& block, int64_t bytes, std::function<void()> landing, simt::Where where) {
    simt::MBarrier& barrier = machine(block, where);
    barrier.bytes -= bytes;
    barrier.landings.push_back(std::move(landing));
    if (barrier.turn()) block.wake(barrier.waiting);
  }

  simt::MBarrier& machine(simt::Block& block, simt::Where where) {
    const auto found = block.mbarriers().find(shared_address(this));
    if (found == block.mbarriers().end()) simt::fail("a barrier that was not initialised", where);
    if (reinterpret_cast<const Barrier*>(block.shared().data() + found->first)->state != kInitialised)
      simt::fail("a barrier that something else was written over", where);
    return found->second;
  }

 private:
  static constexpr uint64_t kInitialised = 0x6d62617272696572;

  void arrive_in(simt::Block& block, simt::Where where) {
    if (block.finished()) simt::fail("an arrival at the barrier of a block that has ended", where);
    simt::MBarrier& barrier = machine(block, where);
    if (barrier.pending == 0) simt::fail("more arrivals at a barrier than it counts", where);
    --barrier.pending;
    if (barrier.turn()) block.wake(barrier.waiting);
  }

  static void sometimes_pass(const char* instruction, simt::Where where) {
    if (simt::Block::current->random().below(4) == 0) simt::Block::current->pass_turn(instruction, where);
  }
};

class BarriersOfBlock {
 public:
  BarriersOfBlock(const Barrier&, uint32_t block) : block_(block) {}

  void arrive_at(Barrier& same, simt::Where where = simt::Where::current()) const { same.arrive_at(block_, where); }

 private:
  uint32_t block_;
};

inline void fence_barrier_init() {
  for (auto& [place, barrier] : simt::Block::current->mbarriers()) barrier.known_to_copies = true;
}

}  // namespace moe::arch
