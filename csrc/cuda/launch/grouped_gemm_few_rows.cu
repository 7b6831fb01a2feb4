// Starts the grouped GEMM of few rows.
#include <algorithm>

#include "cuda/kernels/grouped_gemm_few_rows.cuh"
#include "cuda/launch/grouped_gemm.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

namespace {

template <class T, class W, bool along_k>
void start(const GroupedGemmParams& p, const Device& device) {
  using Arithmetic = FewRowsArithmetic<T, W, along_k>;
  constexpr int kCols = Arithmetic::kCols;
  FewRowsLaunch at{.p = p, .grid = tile_grid(p, kFewRows<T>, kCols), .splits = 1};
  // Tiles are counted without the offsets. A block's warps should have some steps each.
  const int tiles = at.grid.most_tiles(), most_splits = int(p.k / (4 * kFewRowsWarps * Arithmetic::kDepth));
  at.splits = std::max(std::min(device.processors() / tiles, most_splits), 1);
  if (at.splits > 1)
    at.parts = static_cast<float*>(device.scratch(int64_t(sizeof(float)) * tiles * at.splits * kFewRows<T> * kCols));
  if (p.grad_score)
    at.score_parts = static_cast<float*>(device.scratch(p.num_rows * at.grid.col_tiles() * int64_t(sizeof(float))));

  launch({.grid = unsigned(tiles * at.splits),
          .block = kFewRowsThreads,
          .shared_bytes = sizeof(FewRowsShared<T, Arithmetic>),
          .stream = device.stream(),
          .early = device.starts_early()},
         grouped_gemm_few_rows_kernel<T, W, along_k>, at);
  if (at.splits > 1)
    launch({.grid = unsigned(tiles),
            .block = kFewRowsThreads,
            .shared_bytes = sizeof(Products<kFewRows<T>, kCols>),
            .stream = device.stream(),
            .early = device.starts_early()},
           grouped_gemm_few_rows_finish_kernel<T, kCols>, at);
  if (p.grad_score) sum_score_gradients(p, at.score_parts, at.grid.col_tiles(), device);
}

}  // namespace

void grouped_gemm_few_rows(const GroupedGemmParams& p, const Device& device) {
  std::visit(
      [&](auto type, auto along_k) {
        using T = typename decltype(type)::type;
        if constexpr (sizeof(T) == 2)  // float32 weights are rounded to the rows' dtype on the way
          if (p.weight.dtype == Dtype::float32) return start<T, float, along_k>(p, device);
        start<T, T, along_k>(p, device);
      },
      float_type(p.a.rows.dtype, "grouped_gemm"), flag(p.weight.k_stride == 1));
}

}  // namespace moe
