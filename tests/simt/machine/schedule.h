// How the threads of a block take turns: the members of Block.
#pragma once

#include "machine/cluster.h"

namespace simt {

inline std::string hex(uint32_t lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", lanes);
  return text;
}

inline void fail(const std::string& what, Where where) {
  std::string text = what;
  if (where.line() > 0) text += " at " + show(where);
  if (Block* block = Block::current)
    text += ", block " + show(block->index()) + ", thread " + show(block->thread().index);
  throw Error(text);
}

// Stacks that no thread uses.
inline std::vector<std::unique_ptr<Stack>>& idle_stacks() {
  static std::vector<std::unique_ptr<Stack>> stacks;
  return stacks;
}

inline std::unique_ptr<Stack> take_stack() {
  static unsigned made = 0;
  auto& idle = idle_stacks();
  if (idle.empty()) return std::make_unique<Stack>(made++);
  auto stack = std::move(idle.back());
  idle.pop_back();
  return stack;
}

inline Block::Block(Cluster& cluster, unsigned rank, dim3 shape, uint3 index, std::shared_ptr<GuardedMemory> shared,
                    void (*body)(const void*), const void* arguments, uint64_t seed)
    : cluster_(cluster),
      rank_(rank),
      shared_(std::move(shared)),
      async_proxy_(*shared_),
      threads_(size_t(shape.x) * shape.y * shape.z),
      warps_((threads_.size() + 31) / 32),
      random_(seed),
      index_(index),
      body_(body),
      arguments_(arguments) {
  shared_->fill();
  wgmmas_.resize(warps_.size());
  const unsigned registers = unsigned(std::min<size_t>(65536 / threads_.size(), 256) / 8 * 8);
  for (unsigned i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.number = i;
    thread.registers = registers;
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.stack = take_stack();
    start(thread.fiber, *thread.stack, &Block::enter);
    ready_.add(i / 32, 1u << i % 32);
  }
}

inline Block::~Block() {
  for (Thread& thread : threads_) {
    if (!thread.returned) thread.stack->abandon();
    idle_stacks().push_back(std::move(thread.stack));
  }
}

inline void Block::enter() {
  Block& block = *current;
  Thread& self = *block.running_;
  arrived(self.fiber);
  try {
    block.body_(block.arguments_);
    block.expect_nothing_open();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  self.returned = true;
  ++block.returned_;
  block.progressed_ = true;
  block.cluster_.turn();
  block.give_turn(true);
}

inline void Block::run() {
  ready_.add(std::exchange(spinning_, {}));
  progressed_ = false;
  describe_own_stack(scheduler_);
  if (Thread* first = draw()) switch_fiber(scheduler_, first->fiber);
  if (error_) std::rethrow_exception(error_);
}

inline void Block::expect_nothing_open() {
  const Where where = running_->where;
  if (cluster_.order().early && !running_->has_waited)
    fail(
        "a thread of a grid that started early ends without wait_for_previous_grid: the grid behind it would not wait "
        "for the one ahead",
        where);
  if (running_->stores.reads_shared()) fail("a thread ends whose tma_store may still read shared memory", where);
  running_->stores.wait(0, where);
  if (wgmmas_[running_->number / 32].busy()) fail("a thread ends before wgmma_wait", where);
  if (running_threads() > 1) return;
  for (size_t warp = 0; warp < wgmmas_.size(); ++warp)
    if (wgmmas_[warp].asked() != wgmmas_[warp / 4 * 4].asked())
      fail("the warps of a warpgroup have asked for different wgmmas", where);
  if (!events_.empty()) fail("the block ends before " + std::string(events_[0].what) + " has landed", where);
}

inline void Block::let_happen() {
  const size_t i = random_.below(uint32_t(events_.size()));
  const Event event = std::move(events_[i]);
  events_.erase(events_.begin() + ptrdiff_t(i));
  progressed_ = true;
  try {
    event.happens();
  } catch (...) {
    error_ = std::current_exception();
  }
}

// Takes one of the ready threads and puts its index where the kernel reads it.
inline Thread* Block::draw() {
  if (stands_still()) return nullptr;
  while (!error_ && !events_.empty() && (ready_.empty() || random_.below(32) == 0)) let_happen();
  if (error_ || ready_.empty()) return nullptr;
  if (cluster_.size() > 1 && random_.below(64) == 0) {  // a block of the cluster may come in between
    progressed_ = true;
    return nullptr;
  }
  running_ = &threads_[ready_.take(random_)];
  threadIdx = running_->index;
  return running_;
}

// To the next thread, or to run() where none is ready or one has failed.
inline void Block::give_turn(bool ends) {
  Thread& self = *running_;
  Thread* next = error_ ? nullptr : draw();
  if (next != &self) switch_fiber(self.fiber, next ? next->fiber : scheduler_, ends);
}

inline void Block::wait_at(const char* instruction, uint32_t lanes, Where where) {
  running_->instruction = instruction;
  running_->lanes = lanes;
  running_->where = where;
}

inline void Block::expect_same_place(const Thread& other) const {
  const Where here = running_->where, there = other.where;
  const auto mask = [](const Thread& thread) {
    return std::string(thread.instruction) + (thread.lanes ? " with lanes " + hex(thread.lanes) : "");
  };
  if (here.line() == there.line() && here.column() == there.column() && here.file_name() == there.file_name() &&
      running_->lanes == other.lanes)
    return;
  fail("divergent barrier: " + mask(*running_) + ", while thread " + show(other.index) + " waits in " + mask(other) +
           " at " + show(there) + ",",
       here);
}

// The last lane to come acts for all.
inline void Block::meet(const char* instruction, uint32_t lanes, void* args, void (*act)(), Where where,
                        void (*call)(void (*)(), uint32_t, void**)) {
  Thread& self = *running_;
  Warp& warp = warps_[self.number / 32];
  const uint32_t own = 1u << self.lane();
  wait_at(instruction, lanes, where);
  if (!(lanes & own)) fail(std::string(instruction) + " by a lane outside its mask " + hex(lanes), where);
  if (const uint32_t others = warp.arrived & lanes) expect_same_place(in_warp(unsigned(std::countr_zero(others))));
  warp.arrived |= own;
  warp.args[self.lane()] = args;
  if ((warp.arrived & lanes) == lanes) {
    call(act, lanes, warp.args.data());
    warp.arrived &= ~lanes;
    ready_.add(self.number / 32, lanes);
    progressed_ = true;
  }
  give_turn();
}

// Barrier 0 is that of the whole block, and one place in the source; others count threads, wherever they come from.
inline void Block::sync(unsigned barrier, unsigned threads, Where where) {
  Barrier& at = barriers_[barrier];
  wait_at(barrier == 0 ? "sync_block" : "a named barrier", 0, where);
  if (barrier == 0 && at.count > 0) expect_same_place(threads_[at.arrived.first()]);
  at.arrived.add(running_->number / 32, 1u << running_->lane());
  count(barrier, threads, where);
  give_turn();
}

inline void Block::arrive(unsigned barrier, unsigned threads, Where where) {
  count(barrier, threads, where);
  pass_turn("arrive_threads", where);
}

inline void Block::count(unsigned barrier, unsigned threads, Where where) {
  Barrier& at = barriers_[barrier];
  if (at.count > 0 && at.threads != threads)
    fail("a barrier of " + std::to_string(threads) + " threads, where others wait for " + std::to_string(at.threads),
         where);
  at.threads = threads;
  if (++at.count < threads) return;
  wake(at.arrived);
  at = {};
}

inline void Block::wake(ThreadSet& waiting) {
  ready_.add(std::exchange(waiting, {}));
  progressed_ = true;
}

inline void Block::wait_in(ThreadSet& waiting, const char* instruction, Where where) {
  wait_at(instruction, 0, where);
  waiting.add(running_->number / 32, 1u << running_->lane());
  give_turn();
}

inline void Block::pass_turn(const char* instruction, Where where) {
  wait_at(instruction, 0, where);
  ready_.add(running_->number / 32, 1u << running_->lane());
  give_turn();
}

// How many a thread has at first is the compiler's choice; as many as there are is the most.
inline void Block::grow_registers(unsigned count, Where where) {
  Thread& self = *running_;
  if (self.registers_set && count < self.registers)
    fail("take_registers<" + std::to_string(count) + "> of a thread that has " + std::to_string(self.registers), where);
  while (count > self.registers + free_registers_) wait_in(waiting_for_registers_, "take_registers", where);
  free_registers_ = free_registers_ + self.registers - count;
  self.registers = count;
  self.registers_set = true;
}

inline void Block::shrink_registers(unsigned count, Where where) {
  Thread& self = *running_;
  if (count > self.registers)
    fail("give_registers<" + std::to_string(count) + "> of a thread that has " + std::to_string(self.registers), where);
  free_registers_ += self.registers - count;
  self.registers = count;
  self.registers_set = true;
  wake(waiting_for_registers_);
}

inline void Block::wait_for_previous_grid(Where where) {
  running_->has_waited = true;
  while (!cluster_.order().previous_ended) wait_in(waiting_for_grid_, "wait_for_previous_grid", where);
}

// Whoever is first speaks for the block.
inline void Block::let_next_grid_start(Where where) {
  next_may_start_ = true;
  pass_turn("let_next_grid_start", where);
}

inline bool Block::stands_still() const { return next_may_start_ && cluster_.order().next_begins; }

inline void Block::spin(Where where) {
  wait_at("wait_until", 0, where);
  spinning_.add(running_->number / 32, 1u << running_->lane());
  give_turn();
}

inline std::string Block::waiting() const {
  std::string text;
  size_t shown = 0;
  for (const Thread& thread : threads_) {
    if (thread.returned) continue;
    if (++shown > 4) continue;
    text += "thread " + show(thread.index) + " waits in " + thread.instruction + " at " + show(thread.where);
    if (thread.lanes) text += " for lanes " + hex(thread.lanes & ~warps_[thread.number / 32].arrived);
    text += "; ";
  }
  if (shown > 4) text += std::to_string(shown - 4) + " more threads wait; ";
  return text + std::to_string(returned_) + " of " + std::to_string(threads_.size()) + " threads have returned";
}

}  // namespace simt
