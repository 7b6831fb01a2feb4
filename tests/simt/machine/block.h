// A thread block: every thread a fiber, every barrier a change of fiber, the next one drawn at random.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <bit>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "machine/async.h"
#include "machine/fiber.h"
#include "machine/memory.h"
#include "machine/random.h"

namespace simt {

struct Thread {
  Fiber fiber;
  std::unique_ptr<Stack> stack;
  uint3 index;
  unsigned number;
  bool returned = false;
  AsyncCopies copies;

  // Where it last waited, and for which lanes of its warp.
  const char* instruction = "";
  Where where;
  uint32_t lanes = 0;

  unsigned lane() const { return number % 32; }
};

// The arguments that the lanes of a warp brought to one instruction.
template <class Args>
struct Lanes {
  uint32_t mask;
  void* const* of;

  bool has(unsigned lane) const { return mask >> lane & 1; }
  Args& operator[](unsigned lane) const { return *static_cast<Args*>(of[lane]); }
};

class Block {
 public:
  Block(dim3 shape, uint3 index, std::shared_ptr<GuardedMemory> shared, void (*body)(const void*),
        const void* arguments, uint64_t seed);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the threads until none can go on: all have returned, or those left only spin. Throws what a thread threw.
  void run();
  bool finished() const { return returned_ == threads_.size(); }
  bool progressed() const { return progressed_; }  // in the last run
  std::string waiting() const;                     // who waits where, for a message

  // For the thread that runs.
  void sync(unsigned barrier, unsigned threads, Where where);
  void spin(Where where);
  template <class Args>
  void together(const char* instruction, uint32_t lanes, Args& args, void (*act)(const Lanes<Args>&), Where where) {
    meet(instruction, lanes, &args, reinterpret_cast<void (*)()>(act), where,
         [](void (*act)(), uint32_t lanes, void** of) {
           reinterpret_cast<void (*)(const Lanes<Args>&)>(act)({.mask = lanes, .of = of});
         });
  }
  Thread& thread() { return *running_; }
  GuardedMemory& shared() { return *shared_; }
  uint3 index() const { return index_; }

  static inline Block* current = nullptr;

 private:
  struct Warp {
    uint32_t arrived = 0;
    std::array<void*, 32> args;
  };
  // Threads of the block, as lanes by warp.
  class Set {
   public:
    bool empty() const { return warps_ == 0; }
    void add(unsigned warp, uint32_t lanes) { lanes_[warp] |= lanes, warps_ |= 1u << warp; }
    void add(const Set& other) {
      for (uint32_t left = other.warps_; left; left &= left - 1) add(lowest(left), other.lanes_[lowest(left)]);
    }
    unsigned first() const { return lowest(warps_) * 32 + lowest(lanes_[lowest(warps_)]); }
    unsigned take(Random& random);

   private:
    static unsigned lowest(uint32_t bits) { return unsigned(std::countr_zero(bits)); }

    uint32_t warps_ = 0, drawn_ = 0;
    std::array<uint32_t, 32> lanes_{};
  };
  struct Barrier {
    unsigned threads = 0, count = 0;  // that meet here; that have come
    Set arrived;
  };

  static void enter();
  void meet(const char* instruction, uint32_t lanes, void* args, void (*act)(), Where where,
            void (*call)(void (*)(), uint32_t, void**));
  void wait_at(const char* instruction, uint32_t lanes, Where where);
  void expect_same_place(const Thread& other) const;
  Thread* draw();
  void give_turn(bool ends = false);
  Thread& in_warp(unsigned lane) { return threads_[running_->number / 32 * 32 + lane]; }

  std::shared_ptr<GuardedMemory> shared_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::array<Barrier, 16> barriers_;
  Set ready_, spinning_;
  Random random_;
  uint3 index_;
  void (*body_)(const void*);
  const void* arguments_;
  Fiber scheduler_;
  Thread* running_ = nullptr;
  size_t returned_ = 0;
  bool progressed_ = false;
  std::exception_ptr error_;
};

}  // namespace simt
