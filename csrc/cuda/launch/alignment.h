// Whether memory may be read 16 bytes at a time.
#pragma once

#include "stages/params.h"

namespace moe {

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Every row of it begins where 16 bytes may be read.
inline bool has_aligned_rows(const Matrix& m) { return is_aligned(m.data) && m.stride * size_of(m.dtype) % 16 == 0; }

}  // namespace moe
