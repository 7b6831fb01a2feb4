// How wide the accesses to a tensor may be.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cuda/arch/memory.cuh"
#include "stages/params.h"

namespace moe {

// Whether memory may be read `bytes` at a time.
inline bool is_aligned(const void* data, int64_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(data) % uint64_t(bytes) == 0;
}

// Whether every row begins where it may.
inline bool has_aligned_rows(const Matrix& m, int64_t bytes = 16) {
  return is_aligned(m.data, bytes) && m.stride * size_of(m.dtype) % bytes == 0;
}

// Whether four neighbours may be read or written at once.
inline bool has_aligned_quads(const Matrix& m) { return has_aligned_rows(m, 4 * size_of(m.dtype)); }

inline int64_t address(const void* data) { return int64_t(reinterpret_cast<uintptr_t>(data)); }

// The widest access in bytes, 16 at most, that divides all addresses, strides and sizes.
inline int64_t widest_access(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (int64_t n : bytes) all |= n;
  return all & -all;
}

// What moves `bytes` at once.
template <int bytes>
using Bytes = std::conditional_t<bytes >= 4, arch::Pack<uint32_t, bytes / 4>,
                                 std::conditional_t<bytes == 2, arch::Pack<uint16_t, 1>, arch::Pack<uint8_t, 1>>>;

}  // namespace moe
