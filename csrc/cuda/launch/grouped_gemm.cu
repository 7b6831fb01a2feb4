// Starts the ragged-M grouped GEMM and, behind its backward epilogue, the sum of the score gradients.
#include "cuda/kernels/grouped_gemm.cuh"
#include "cuda/kernels/score_grad.cuh"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda/launch/gemm_config.h"
#include "cuda/launch/grouped_gemm.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

namespace {

template <class T, class Config, bool k_major, bool direct>
void start(const GroupedGemmParams& p, const TileGrid& grid, float* parts, const Device& device) {
  constexpr GemmConfig config = Config::value;
  using Shared = GemmShared<RowTiles<T, Config, direct>, WeightTiles<T, Config, k_major, direct>, Config>;
  static_assert(sizeof(Shared) <= kSharedBytesOfEveryCard);
  const int blocks = std::min(grid.most_tiles(), device.processors() * config.blocks);
  launch({.grid = unsigned(blocks),
          .block = unsigned(config.threads()),
          .shared_bytes = sizeof(Shared),
          .stream = device.stream(),
          .early = device.starts_early()},
         grouped_gemm_kernel<T, Config, k_major, direct>, p, grid, parts);
}

template <class T>
void multiply(const GroupedGemmParams& p, const Device& device) {
  const bool direct = rows_are_aligned(p.a) && weights_are_aligned(p) && !p.a.scale && p.weight.dtype == p.a.rows.dtype;
  const GemmConfig config = pick_config(device.processors(), {.dtype = p.a.rows.dtype,
                                                              .rows = p.num_rows,
                                                              .experts = p.num_experts,
                                                              .n = p.n,
                                                              .direct = direct,
                                                              .allow_tf32 = p.allow_tf32});
  const TileGrid grid = tile_grid(p, config.rows, config.cols);
  const int col_tiles = p.n > 0 ? grid.col_tiles() : 0;
  float* parts = nullptr;  // of the score gradient: [num_rows, col_tiles]
  if (p.grad_score) parts = static_cast<float*>(device.scratch(p.num_rows * col_tiles * int64_t(sizeof(float))));
  std::visit(
      [&](auto k_major, auto as_they_lie) {
        if constexpr (sizeof(T) == 4) {
          if constexpr (as_they_lie)
            if (config == kTf32Tiles) return start<T, Tf32Tiles, k_major, true>(p, grid, parts, device);
          start<T, FloatTiles, k_major, as_they_lie>(p, grid, parts, device);
        } else if constexpr (!as_they_lie) start<T, ConvertingTiles, k_major, false>(p, grid, parts, device);
        else if (config == kLargeTiles) start<T, LargeTiles, k_major, true>(p, grid, parts, device);
        else start<T, SmallTiles, k_major, true>(p, grid, parts, device);
      },
      flag(p.weight.k_stride == 1), flag(direct));
  if (p.grad_score) sum_score_gradients(p, parts, col_tiles, device);
}

}  // namespace

void sum_score_gradients(const GroupedGemmParams& p, const float* parts, int64_t col_tiles, const Device& device) {
  // Slots without a row get zeros.
  check(cudaMemsetAsync(p.grad_score, 0, size_t(p.a.num_rows * p.a.width) * sizeof(float), device.stream()));
  const TileGrid grid{.offsets = p.offsets,
                      .num_experts = int(p.num_experts),
                      .num_rows = p.num_rows,
                      .num_cols = 1,
                      .rows = 32,
                      .cols = 1};
  const int blocks = std::min(grid.most_tiles(), device.processors() * 16);
  std::visit(
      [&](auto type) {
        launch({.grid = unsigned(blocks),
                .block = kScoreGradThreads,
                .stream = device.stream(),
                .early = device.starts_early()},
               score_grad_kernel<typename decltype(type)::type>, p, grid, parts, int(col_tiles));
      },
      float_type(p.a.rows.dtype, "grouped_gemm"));
}

void grouped_gemm(const GroupedGemmParams& p, const Device& device) {
  if (p.weight.prepacked) throw std::invalid_argument("grouped_gemm: a PackedWeight is for the CPU");
  if (p.num_rows > std::numeric_limits<int32_t>::max())  // offsets do not reach further, nor does the walk over tiles
    throw std::invalid_argument("grouped_gemm: a must have fewer than 2^31 rows, got " + std::to_string(p.num_rows));
  if (p.num_rows == 0) {
    if (p.grad_score) sum_score_gradients(p, nullptr, 0, device);
  } else if (p.num_rows <= kFewRowsOfProblem && !p.batch_invariant) {
    grouped_gemm_few_rows(p, device);
  } else if (!grouped_gemm_sm90(p, device)) {
    std::visit([&](auto type) { multiply<typename decltype(type)::type>(p, device); },
               float_type(p.a.rows.dtype, "grouped_gemm"));
  }
}

}  // namespace moe
