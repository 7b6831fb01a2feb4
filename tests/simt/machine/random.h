// A small random generator (xorshift64*, Vigna 2016), the same on every machine.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace simt {

class Random {
 public:
  explicit Random(uint64_t seed) : state_((seed + 1) * 0x9e3779b97f4a7c15u | 1) { next(); }

  uint64_t next() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1du;
  }
  uint32_t below(uint32_t n) { return uint32_t((next() >> 32) * n >> 32); }

  template <class T>
  void shuffle(std::vector<T>& values) {
    for (uint32_t i = uint32_t(values.size()); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  uint64_t state_;
};

}  // namespace simt
