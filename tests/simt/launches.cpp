// What this process has run so far, for the tests that count: kernels, the wgmmas of their warps, boxes for a cluster.
#include "machine/grid.h"

extern "C" __attribute__((visibility("default"))) uint64_t moe_ops_simt_launches() { return simt::launches; }
extern "C" __attribute__((visibility("default"))) uint64_t moe_ops_simt_early_launches() {
  return simt::early_launches;
}
extern "C" __attribute__((visibility("default"))) uint64_t moe_ops_simt_wgmmas() { return simt::wgmmas_of_warps; }
extern "C" __attribute__((visibility("default"))) uint64_t moe_ops_simt_multicasts() { return simt::multicasts; }
