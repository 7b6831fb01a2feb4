// Working memory of the calling thread.
#pragma once

#include <cstddef>

namespace moe {

// At least `bytes`, 64-byte aligned, kept for the thread's next call; contents are whatever was left there.
void* scratch(size_t bytes);

}  // namespace moe
