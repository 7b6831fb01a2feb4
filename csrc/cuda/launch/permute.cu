// permute: one launch.
#include "cuda/arch/launch.cuh"
#include "cuda/kernels/permute.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

void permute(const PermuteParams& p, const Device& device) {
  if (p.rows == 0 || p.row_bytes == 0) return;
  const int64_t widest = widest_access({address(p.x), p.x_stride_bytes, address(p.out), p.row_bytes});
  std::visit(
      [&](auto bytes) {
        using Access = Bytes<bytes>;
        launch({.grid = unsigned(permute_blocks<Access>(p)),
                .block = kPermuteThreads,
                .stream = device.stream(),
                .early = device.starts_early()},
               permute_kernel<Access>, p);
      },
      at_least<1, 2, 4, 8, 16>(widest));
}

}  // namespace moe
