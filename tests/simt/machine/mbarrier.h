// A barrier in shared memory that counts arrivals and bytes, as the hardware keeps it.
#pragma once

#include <functional>
#include <vector>

#include "machine/thread_set.h"

namespace simt {

struct MBarrier {
  uint32_t expected;  // arrivals in a phase
  uint32_t pending;   // of them, in this one
  int64_t bytes = 0;  // that copies have still to bring
  uint32_t parity = 0;
  bool known_to_copies = false;  // a fence followed its init

  ThreadSet waiting;
  std::vector<std::function<void()>> landings;  // what the phase's copies bring, seen when it completes

  // Whether the phase is complete, and the next one begins.
  bool turn() {
    if (pending > 0 || bytes != 0) return false;
    for (const auto& land : std::exchange(landings, {})) land();
    pending = expected;
    parity ^= 1;
    return true;
  }
};

}  // namespace simt
