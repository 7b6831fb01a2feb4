// The grouped GEMM of few rows: bound by reading the weights of the experts that have any, once for every 16 rows. A
// block has some columns of one expert, its warps share the reduction, and their sums are added in a fixed order. Where
// that makes too few blocks to fill the card, several share a tile's reduction and a second kernel adds their parts.
//
// Mixtral 8x7B on two ranks, one token: H = 4096, I = 7168, two experts of 3 H I weights in bfloat16 are 352 MB a
// layer, or 105 us at the 3.35 TB/s that an H100's memory is said to have.
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/few_rows_products.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

inline constexpr int kFewRowsThreads = 256, kFewRowsWarps = kFewRowsThreads / 32;

template <class T, class W, bool along_k>
using FewRowsArithmetic = std::conditional_t<sizeof(T) == 2, TensorCoreFewRows<T, W, along_k>, FloatFewRows<along_k>>;

template <class T, class Arithmetic>
struct FewRowsShared {
  FewRowsOperand<T> rows;
  Products<kFewRows<T>, Arithmetic::kCols> parts[kFewRowsWarps];
};

struct FewRowsLaunch {
  GroupedGemmParams p;
  TileGrid grid;
  float* score_parts;  // [R, tiles of columns], see the epilogue
  int splits;          // blocks that share the reduction of a tile
  float* parts;        // [tiles, splits, rows of a tile, columns of a tile] where there are several
};

// f(row, col) for the products of a tile, shared out to the threads of a block.
template <int cols, class F>
MOE_INLINE void for_each_product(const Tile& tile, const F& f) {
  for (int i = int(threadIdx.x); i < tile.rows * cols; i += kFewRowsThreads) f(i / cols, i % cols);
}

template <int cols>
MOE_INLINE float few_rows_bias(const GroupedGemmParams& p, const Tile& tile, int col) {
  if (!p.bias.data || tile.cols == 0) return 0;
  return read(p.bias, tile.expert * p.n + weight_columns(p, tile, cols).template at<cols>(col));
}

// A warp's part of the steps begin .. end of the reduction. While one waits for its weights, the processor's other
// warps have asked for theirs.
template <class Arithmetic>
MOE_INLINE void add_steps(Arithmetic& products, int64_t begin, int64_t end) {
  for (int64_t step = begin + int(threadIdx.x) / 32; step < end; step += kFewRowsWarps)
    products.add(products.load(step * Arithmetic::kDepth));
}

template <class T, class W, bool along_k>
__global__ void __launch_bounds__(kFewRowsThreads, 2)
    grouped_gemm_few_rows_kernel(const __grid_constant__ FewRowsLaunch at) {
  take_turn();
  using Arithmetic = FewRowsArithmetic<T, W, along_k>;
  constexpr int kCols = Arithmetic::kCols;
  auto& shared = arch::shared<FewRowsShared<T, Arithmetic>>();
  const GroupedGemmParams& p = at.p;
  const int index = int(blockIdx.x) / at.splits, split = int(blockIdx.x) % at.splits;
  TileWalk walk(at.grid);
  if (!walk.seek(index)) return;
  const Tile tile = walk.tile();
  if (tile.expert == p.num_experts) {
    if (split == 0) zero_tile<T>(p, tile);
    return;
  }

  find_rows(p, tile, shared.rows);
  arch::sync_block();  // the rows are found
  Arithmetic products(p, tile, shared.rows);
  const int64_t steps = tile.cols ? ceil_div(p.k, Arithmetic::kDepth) : 0;
  add_steps(products, steps * split / at.splits, steps * (split + 1) / at.splits);
  products.put(shared.parts[threadIdx.x / 32]);
  arch::sync_block();  // the warps' parts are there

  const auto sum = [&](int row, int col) {
    float sum = 0;
    for (auto& part : shared.parts) sum += *part.at(row, col);
    return sum;
  };
  if (at.splits > 1) {
    float* const to = at.parts + (int64_t(index) * at.splits + split) * kFewRows<T> * kCols;
    for_each_product<kCols>(tile, [&](int row, int col) { to[row * kCols + col] = sum(row, col); });
    return;
  }
  for_each_product<kCols>(tile, [&](int row, int col) {
    *shared.parts[0].at(row, col) = sum(row, col) + few_rows_bias<kCols>(p, tile, col);
  });
  arch::sync_block();  // the products are complete
  finish_tile<T>(p, tile, shared.parts[0], at.score_parts, at.grid.col_tiles());
}

// The blocks' parts of a tile, and the epilogue.
template <class T, int cols>
__global__ void __launch_bounds__(kFewRowsThreads, 4)
    grouped_gemm_few_rows_finish_kernel(const __grid_constant__ FewRowsLaunch at) {
  take_turn();
  auto& products = arch::shared<Products<kFewRows<T>, cols>>();
  TileWalk walk(at.grid);
  if (!walk.seek(int(blockIdx.x))) return;
  const Tile tile = walk.tile();
  if (tile.expert == at.p.num_experts) return;

  const float* const parts = at.parts + int64_t(blockIdx.x) * at.splits * kFewRows<T> * cols;
  for_each_product<cols>(tile, [&](int row, int col) {
    float sum = 0;
    for (int split = 0; split < at.splits; ++split) sum += parts[(split * kFewRows<T> + row) * cols + col];
    *products.at(row, col) = sum + few_rows_bias<cols>(at.p, tile, col);
  });
  arch::sync_block();  // the products are complete
  finish_tile<T>(at.p, tile, products, at.score_parts, at.grid.col_tiles());
}

}  // namespace moe
