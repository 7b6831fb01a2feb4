// A thread block: every thread a fiber, every barrier a change of fiber, the next one drawn at random.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "machine/async.h"
#include "machine/async_proxy.h"
#include "machine/fiber.h"
#include "machine/mbarrier.h"
#include "machine/memory.h"
#include "machine/random.h"
#include "machine/thread_set.h"
#include "machine/wgmma.h"

namespace simt {

struct Thread {
  Fiber fiber;
  std::unique_ptr<Stack> stack;
  uint3 index;
  unsigned number;
  bool returned = false;
  AsyncCopies copies;
  BulkStores stores;
  unsigned registers = 0;
  bool registers_set = false;
  bool has_waited = false;                // for the grid ahead
  std::optional<uint64_t> cluster_phase;  // in which it has arrived

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

// Of a grid between those ahead of it and behind it in the stream.
struct GridOrder {
  bool early;                  // may begin before the grid ahead has ended
  bool previous_ended = true;  // and may be waited for
  bool next_begins = false;    // until it has, blocks that let it start stand still
};

class Cluster;

inline std::string show(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

class Block {
 public:
  Block(Cluster& cluster, unsigned rank, dim3 shape, uint3 index, std::shared_ptr<GuardedMemory> shared,
        void (*body)(const void*), const void* arguments, uint64_t seed);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Runs the threads until none can go on: all have returned, or those left only spin. Throws what a thread threw.
  void run();
  bool finished() const { return returned_ == threads_.size(); }
  bool progressed() const { return progressed_; }  // in the last run
  bool can_go_on() const { return !ready_.empty() && !stands_still(); }
  bool spins() const { return !spinning_.empty(); }
  bool waits_for_grids() const { return stands_still() || !waiting_for_grid_.empty(); }
  bool next_grid_may_start() const { return next_may_start_ || finished(); }
  std::string waiting() const;  // who waits where, for a message

  // For the thread that runs.
  void sync(unsigned barrier, unsigned threads, Where where);
  void arrive(unsigned barrier, unsigned threads, Where where);
  void spin(Where where);
  template <class Args>
  void together(const char* instruction, uint32_t lanes, Args& args, void (*act)(const Lanes<Args>&), Where where) {
    meet(instruction, lanes, &args, reinterpret_cast<void (*)()>(act), where,
         [](void (*act)(), uint32_t lanes, void** of) {
           reinterpret_cast<void (*)(const Lanes<Args>&)>(act)({.mask = lanes, .of = of});
         });
  }
  void wait_in(ThreadSet& waiting, const char* instruction, Where where);  // until wake(waiting)
  void pass_turn(const char* instruction, Where where);                    // others may come first
  void grow_registers(unsigned count, Where where);
  void shrink_registers(unsigned count, Where where);
  void wait_for_previous_grid(Where where);
  void let_next_grid_start(Where where);
  void previous_grid_has_ended() { wake(waiting_for_grid_); }

  // What happens beside the threads: at some time, at the latest when no thread can go on without it.
  void later(const char* what, std::function<void()> event) { events_.push_back({what, std::move(event)}); }
  void wake(ThreadSet& waiting);

  Thread& thread() { return *running_; }
  unsigned number_of_threads() const { return unsigned(threads_.size()); }
  size_t running_threads() const { return threads_.size() - returned_; }
  Wgmmas& wgmmas() { return wgmmas_[running_->number / 32]; }
  AsyncProxy& async_proxy() { return async_proxy_; }
  std::map<int64_t, MBarrier>& mbarriers() { return mbarriers_; }
  Random& random() { return random_; }
  Cluster& cluster() { return cluster_; }
  unsigned rank() const { return rank_; }
  GuardedMemory& shared() { return *shared_; }
  uint3 index() const { return index_; }

  static inline Block* current = nullptr;

 private:
  struct Warp {
    uint32_t arrived = 0;
    std::array<void*, 32> args;
  };
  struct Barrier {
    unsigned threads = 0, count = 0;  // that meet here; that have come
    ThreadSet arrived;
  };
  struct Event {
    const char* what;
    std::function<void()> happens;
  };

  static void enter();
  void meet(const char* instruction, uint32_t lanes, void* args, void (*act)(), Where where,
            void (*call)(void (*)(), uint32_t, void**));
  void wait_at(const char* instruction, uint32_t lanes, Where where);
  void expect_same_place(const Thread& other) const;
  Thread* draw();
  void let_happen();
  void expect_nothing_open();
  void count(unsigned barrier, unsigned threads, Where where);
  bool stands_still() const;
  void give_turn(bool ends = false);
  Thread& in_warp(unsigned lane) { return threads_[running_->number / 32 * 32 + lane]; }

  Cluster& cluster_;
  unsigned rank_;
  std::shared_ptr<GuardedMemory> shared_;
  AsyncProxy async_proxy_;
  std::map<int64_t, MBarrier> mbarriers_;  // by their place in shared memory
  std::vector<Event> events_;
  std::vector<Wgmmas> wgmmas_;  // of each warp
  ThreadSet waiting_for_registers_, waiting_for_grid_;
  unsigned free_registers_ = 0;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::array<Barrier, 16> barriers_;
  ThreadSet ready_, spinning_;
  Random random_;
  uint3 index_;
  void (*body_)(const void*);
  const void* arguments_;
  Fiber scheduler_;
  Thread* running_ = nullptr;
  size_t returned_ = 0;
  bool progressed_ = false;
  bool next_may_start_ = false;
  std::exception_ptr error_;
};

}  // namespace simt
