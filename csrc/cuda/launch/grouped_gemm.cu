// Starts the ragged-M grouped GEMM and, behind its backward epilogue, the sum of the score gradients.
#include "cuda/kernels/grouped_gemm.cuh"

#include <algorithm>

#include "cuda/launch/gemm_config.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

namespace {

template <class T, class Config, bool k_major, bool direct>
void start(const GroupedGemmParams& p, const TileGrid& grid, float* partial_score, const Device& device) {
  constexpr GemmConfig config = Config::value;
  using Shared = GemmShared<RowTiles<T, Config, direct>, WeightTiles<T, Config, k_major, direct>, Config>;
  const int64_t blocks = std::min(grid.most_tiles(), int64_t(device.processors()) * config.blocks);
  launch({.grid = unsigned(blocks),
          .block = unsigned(config.threads()),
          .shared_bytes = sizeof(Shared),
          .stream = device.stream()},
         grouped_gemm_kernel<T, Config, k_major, direct>, p, grid, partial_score);
}

template <class T>
void multiply(const GroupedGemmParams& p, const Device& device) {
  const bool direct = rows_are_aligned(p.a) && weights_are_aligned(p) && !p.a.scale && p.weight.dtype == p.a.rows.dtype;
  const GemmConfig config = pick_config(
      device.arch(),
      {.dtype = p.a.rows.dtype, .rows = p.num_rows, .experts = p.num_experts, .n = p.n, .k = p.k, .direct = direct});
  const bool halves = p.epilogue == Epilogue::activate && p.activation.gated;
  const TileGrid grid{.offsets = p.offsets,
                      .num_experts = int(p.num_experts),
                      .num_rows = p.num_rows,
                      .num_cols = halves ? p.n / 2 : p.n,
                      .rows = config.rows,
                      .cols = halves ? config.cols / 2 : config.cols};
  std::visit(
      [&](auto k_major) {
        if (!direct) start<T, SmallTiles, k_major, false>(p, grid, nullptr, device);
        else if (config == kLargeTiles) start<T, LargeTiles, k_major, true>(p, grid, nullptr, device);
        else start<T, SmallTiles, k_major, true>(p, grid, nullptr, device);
      },
      flag(p.weight.k_stride == 1));
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Device& device) {
  if (p.num_rows == 0) return;
  std::visit(
      [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (sizeof(T) == 2) multiply<T>(p, device);
      },
      float_type(p.a.rows.dtype, "grouped_gemm"));
}

}  // namespace moe
