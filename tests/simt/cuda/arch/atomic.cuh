// Additions that many threads make to one place, checked; one thread runs at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "machine/schedule.h"

namespace moe::arch {

inline int32_t fetch_add(int32_t* to, int32_t value, simt::Where where = simt::Where::current()) {
  simt::check_access("an atomic addition", to, sizeof(*to), sizeof(*to), where);
  const int32_t before = *to;
  *to += value;
  return before;
}

inline void add(int32_t* to, int32_t value, simt::Where where = simt::Where::current()) { fetch_add(to, value, where); }

inline void add(uint64_t* to, uint64_t value, simt::Where where = simt::Where::current()) {
  simt::check_access("an atomic addition", to, sizeof(*to), sizeof(*to), where);
  *to += value;
}

inline void set_bits(uint64_t* to, uint64_t bits, simt::Where where = simt::Where::current()) {
  simt::check_access("an atomic or", to, sizeof(*to), sizeof(*to), where);
  *to |= bits;
}

}  // namespace moe::arch
