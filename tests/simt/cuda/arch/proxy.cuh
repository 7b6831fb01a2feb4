// Order between threads' stores and TMA and wgmma: these see a copy of shared memory that a fence brings up to date.
#pragma once

#include <cuda_runtime.h>

#include "machine/schedule.h"

namespace moe::arch {

inline void fence_async_proxy() { simt::Block::current->async_proxy().fence(); }

}  // namespace moe::arch
