// How the threads of a block take turns: the members of Block.
#pragma once

#include "machine/block.h"

namespace simt {

inline std::string show(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

inline std::string hex(uint32_t lanes) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", lanes);
  return text;
}

inline void fail(const std::string& what, Where where) {
  std::string text = what + " at " + show(where);
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

inline Block::Block(dim3 shape, uint3 index, std::shared_ptr<GuardedMemory> shared, void (*body)(const void*),
                    const void* arguments, uint64_t seed)
    : shared_(std::move(shared)),
      threads_(size_t(shape.x) * shape.y * shape.z),
      warps_((threads_.size() + 31) / 32),
      random_(seed),
      index_(index),
      body_(body),
      arguments_(arguments) {
  shared_->fill();
  for (unsigned i = 0; i < threads_.size(); ++i) {
    Thread& thread = threads_[i];
    thread.number = i;
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
  } catch (...) {
    block.error_ = std::current_exception();
  }
  self.returned = true;
  ++block.returned_;
  block.progressed_ = true;
  block.give_turn(true);
}

inline void Block::run() {
  ready_.add(std::exchange(spinning_, {}));
  progressed_ = false;
  describe_own_stack(scheduler_);
  if (Thread* first = draw()) switch_fiber(scheduler_, first->fiber);
  if (error_) std::rethrow_exception(error_);
  if (!finished() && spinning_.empty()) throw Error("deadlock in block " + show(index_) + ": " + waiting());
}

// Some thread of the set, most often one of the warp that ran last: its stacks are in the cache.
inline unsigned Block::Set::take(Random& random) {
  const uint64_t dice = random.next();
  const auto draw = [](uint32_t of, int from) { return unsigned(from + std::countr_zero(std::rotr(of, from))) % 32; };
  if (!(warps_ >> drawn_ & 1) || dice >> 61 == 0) drawn_ = draw(warps_, int(dice >> 32 & 31));
  const unsigned lane = draw(lanes_[drawn_], int(dice >> 40 & 31));
  lanes_[drawn_] &= ~(1u << lane);
  if (!lanes_[drawn_]) warps_ &= ~(1u << drawn_);
  return drawn_ * 32 + lane;
}

// Takes one of the ready threads and puts its index where the kernel reads it.
inline Thread* Block::draw() {
  if (ready_.empty()) return nullptr;
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
  if (at.count > 0) {
    if (barrier == 0) expect_same_place(threads_[at.arrived.first()]);
    if (at.threads != threads)
      fail("a barrier of " + std::to_string(threads) + " threads, where others wait for " + std::to_string(at.threads),
           where);
  }
  at.threads = threads;
  at.arrived.add(running_->number / 32, 1u << running_->lane());
  if (++at.count == threads) {
    ready_.add(at.arrived);
    at = {};
    progressed_ = true;
  }
  give_turn();
}

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
