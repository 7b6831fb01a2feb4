// What this machine can do at best, measured: the roofs that benches hold their times against.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace moe {

// FLOP/s of multiply-adds on torch's threads with the instruction set in use, the best of several runs within
// `seconds`; 0 where the dtype has no arithmetic of its own.
MOE_EXPORT double peak_arithmetic(Dtype dtype, double seconds);

struct Bandwidth {
  double read, copy;  // bytes per second; copy counts what is read and what is written
};

// Passes over two buffers of `bytes` each, which should be several times the last cache, for `seconds` each.
MOE_EXPORT Bandwidth peak_bandwidth(int64_t bytes, double seconds);

}  // namespace moe
