// What this machine can do at best, measured: the roofs that benches hold their times against.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "cpu/isa.h"

namespace moe {

// FLOP/s of multiply-adds on torch's threads with the instruction set in use, the median within `seconds`; 0 where the
// dtype has no arithmetic of its own.
MOE_EXPORT double peak_arithmetic(Dtype dtype, double seconds);

// So many FLOPs in registers alone, on torch's threads; in float32 where the dtype has no arithmetic of its own. What a
// stage can be held against within one interleaved run, as the clock of a shared machine moves.
MOE_EXPORT void multiply_adds(Dtype dtype, double flops);

struct Bandwidth {
  double read, copy;  // bytes per second; copy counts what is read and what is written
};

// Passes over two buffers of `bytes` each, which should be several times the last cache, for `seconds` each.
MOE_EXPORT Bandwidth peak_bandwidth(int64_t bytes, double seconds);

struct FreeAligned {
  void operator()(float* buffer) const { ::operator delete[](buffer, std::align_val_t(64)); }
};
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

// As many bytes read and written as a stage's, in order, into fresh memory, and nothing computed: what the stage can be
// held against within one interleaved run, as the bandwidth of a shared machine moves.
class MOE_EXPORT InOrder {
 public:
  InOrder(int64_t read, int64_t written);
  void run() const;

 private:
  int64_t read_, written_;
  AlignedFloats from_;
};

}  // namespace moe
