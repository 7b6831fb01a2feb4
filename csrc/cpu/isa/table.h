// What each instruction set supplies: the loops below a stage, each over one contiguous piece of work. The stages
// (cpu/<verb>.cpp) cut the work into pieces and run them on torch's threads.
#pragma once

#include "stages/params.h"

namespace moe {

// The result of a grouped GEMM is computed in tiles of this size; where the activation is gated, a tile's columns are
// half gates and half ups.
inline constexpr int kTileRows = 192;
inline constexpr int kTileCols = 256;

// A tile: rows of one expert, and columns of the result (inner columns where an activation follows).
struct Tile {
  int64_t expert, row_begin, rows, col_begin, cols;
};

struct Kernels {
  const char* name;

  // Tokens begin..end. partial_* [S, E] are added to: the statistics of these tokens alone; null without statistics.
  void (*route)(const RouteParams&, int64_t begin, int64_t end, int32_t* partial_counts, double* partial_prob);
  // partial_scale [E] is added to, null without expert scales; tokens_of_segment [S] divides grad_mean_prob.
  void (*route_backward)(const RouteBackwardParams&, int64_t begin, int64_t end, const int64_t* tokens_of_segment,
                         double* partial_scale);

  // Tokens begin..end; rows that no token has are left alone.
  void (*permute)(const PermuteParams&, int64_t begin, int64_t end);
  void (*combine)(const CombineParams&, int64_t begin, int64_t end);
  void (*combine_backward)(const CombineBackwardParams&, int64_t begin, int64_t end);

  // partial_score [R, score_stride] takes the tile's share of grad_score.
  void (*grouped_gemm)(const GroupedGemmParams&, const Tile& tile, void* partial_score, int64_t score_stride);
  // Of an expert's [N, K] gradient a tile's rows from n_begin on, columns k_begin..k_end, where k_begin is a tile's
  // first.
  void (*grouped_gemm_weight_grad)(const WeightGradParams&, int64_t expert, int64_t row_begin, int64_t row_end,
                                   int64_t n_begin, int64_t k_begin, int64_t k_end);
  // Columns col_begin..col_end of an expert's bias gradient.
  void (*grouped_gemm_bias_grad)(const BiasGradParams&, int64_t expert, int64_t row_begin, int64_t row_end,
                                 int64_t col_begin, int64_t col_end);

  double (*roof_arithmetic)(Dtype dtype, int64_t rounds, double* sink);
  void (*roof_read)(const float* from, int64_t bytes, int streams, double* sink);
  void (*roof_move)(float* to, int64_t written, const float* from, int64_t read);
};

}  // namespace moe
