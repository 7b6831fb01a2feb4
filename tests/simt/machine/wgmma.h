// The wgmmas of a warp, its quarter of them: what they sum is seen at the wait, their operands stay as they are till
// then.
#pragma once

#include <deque>
#include <functional>
#include <list>
#include <vector>

#include "machine/memory.h"
#include "machine/thread_set.h"

namespace simt {

inline uint64_t wgmmas_of_warps = 0;  // of this process

class Wgmmas {
 public:
  struct Registers {
    float* of[32];  // each lane's accumulators
    int count;
  };
  struct Wgmma {
    std::function<bool()> operands_unchanged;
    Where where;
  };

  void fence() { fenced_ = true; }

  // Begins one: the sums [count, 32] that it adds to, zeros where it does not accumulate. What the lanes hold is
  // poison.
  float* begin(const Registers& d, bool accumulate, Wgmma wgmma) {
    auto sums = std::find_if(sums_.begin(), sums_.end(), [&](const Sums& s) { return s.d.of[0] == d.of[0]; });
    if (sums == sums_.end()) {
      if (!fenced_) fail("wgmma without a wgmma_fence before it: registers may have been touched", wgmma.where);
      sums = sums_.insert(sums_.end(), {.d = d, .values = std::vector<float>(size_t(d.count) * 32)});
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < d.count; ++i) sums->values[size_t(i * 32 + lane)] = d.of[lane][i];
        std::memset(d.of[lane], poison(), size_t(d.count) * sizeof(float));
      }
    } else {
      expect_untouched(*sums, wgmma.where);
    }
    if (!accumulate) sums->values.assign(sums->values.size(), 0);
    ++sums->running, ++wgmmas_of_warps;
    open_.push_back({std::move(wgmma), sums});
    return sums->values.data();
  }

  void commit() { groups_.push_back(std::exchange(open_, {})); }

  void wait(size_t pending, Where where) {
    for (; groups_.size() > pending; groups_.pop_front()) {
      for (const Running& running : groups_.front()) {
        if (!running.wgmma.operands_unchanged())
          fail("an operand of the wgmma at " + show(running.wgmma.where) + " was overwritten before its wgmma_wait",
               where);
        if (--running.sums->running == 0) finish(running.sums, where);
      }
      fenced_ = false;
    }
  }

  // What the warp has asked for so far: the four of a warpgroup ask for the same.
  void ask(uint64_t a, uint64_t b) { asked_ = (asked_ * 0x9e3779b97f4a7c15u ^ a) * 0x9e3779b97f4a7c15u ^ b; }
  uint64_t asked() const { return asked_; }

  size_t groups() const { return groups_.size(); }
  ThreadSet waiting;

  bool busy() const { return !open_.empty() || !groups_.empty(); }

 private:
  struct Sums {
    Registers d;
    std::vector<float> values;
    int running = 0;
  };
  struct Running {
    Wgmma wgmma;
    std::list<Sums>::iterator sums;
  };

  static void expect_untouched(const Sums& sums, Where where) {
    for (const float* registers : sums.d.of)
      for (size_t byte = 0; byte < size_t(sums.d.count) * sizeof(float); ++byte)
        if (reinterpret_cast<const unsigned char*>(registers)[byte] != poison())
          fail("the accumulators of a wgmma were written before its wgmma_wait", where);
  }

  void finish(std::list<Sums>::iterator sums, Where where) {
    expect_untouched(*sums, where);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < sums->d.count; ++i) sums->d.of[lane][i] = sums->values[size_t(i * 32 + lane)];
    sums_.erase(sums);
  }

  bool fenced_ = false;
  uint64_t asked_ = 0;
  std::list<Sums> sums_;
  std::vector<Running> open_;
  std::deque<std::vector<Running>> groups_;
};

}  // namespace simt
