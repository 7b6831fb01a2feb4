// Huge pages. Fresh memory comes in pages of 4 KiB: the faults of their first use cost more than the writing, their
// translation up to a twentieth of the reading. torch asks for huge ones under THP_MEM_ALLOC_ENABLE=1 alone.
#pragma once

#include <sys/mman.h>

#include <cstdint>

namespace moe {

// Before the memory is first written; where the kernel refuses, pages of 4 KiB do.
inline void ask_for_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace moe
