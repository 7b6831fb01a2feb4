// How many kernels this process has started, for the tests that count them.
#include "machine/grid.h"

extern "C" __attribute__((visibility("default"))) uint64_t moe_ops_simt_launches() { return simt::launches; }
