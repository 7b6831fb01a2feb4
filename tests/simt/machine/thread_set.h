// Threads of a block, as lanes by warp.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "machine/random.h"

namespace simt {

class ThreadSet {
 public:
  bool empty() const { return warps_ == 0; }
  void add(unsigned warp, uint32_t lanes) { lanes_[warp] |= lanes, warps_ |= 1u << warp; }
  void add(const ThreadSet& other) {
    for (uint32_t left = other.warps_; left; left &= left - 1) add(lowest(left), other.lanes_[lowest(left)]);
  }
  unsigned first() const { return lowest(warps_) * 32 + lowest(lanes_[lowest(warps_)]); }

  // Some thread of the set, most often one of the warp that ran last: its stacks are in the cache.
  unsigned take(Random& random) {
    const uint64_t dice = random.next();
    const auto draw = [](uint32_t of, int from) { return unsigned(from + std::countr_zero(std::rotr(of, from))) % 32; };
    if (!(warps_ >> drawn_ & 1) || dice >> 61 == 0) drawn_ = draw(warps_, int(dice >> 32 & 31));
    const unsigned lane = draw(lanes_[drawn_], int(dice >> 40 & 31));
    lanes_[drawn_] &= ~(1u << lane);
    if (!lanes_[drawn_]) warps_ &= ~(1u << drawn_);
    return drawn_ * 32 + lane;
  }

 private:
  static unsigned lowest(uint32_t bits) { return unsigned(std::countr_zero(bits)); }

  uint32_t warps_ = 0, drawn_ = 0;
  std::array<uint32_t, 32> lanes_{};
};

}  // namespace simt
