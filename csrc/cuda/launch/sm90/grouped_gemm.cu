// Starts the ragged-M grouped GEMM of sm_90a: as many blocks as there are processors, alone or in clusters of two.
#include <algorithm>
#include <limits>

#include "cuda/kernels/grouped_gemm_sm90.cuh"
#include "cuda/launch/gemm_clusters_sm90.h"
#include "cuda/launch/grouped_gemm.h"
#include "cuda/launch/tensor_map.h"
#include "cuda/launch/variant.h"
#include "device.h"

namespace moe {

namespace {

// Expert weights as they lie: K and N, or N and K, experts behind.
BoxedTensor boxed_weights(const GroupedGemmParams& p, int cols) {
  const ExpertWeights& w = p.weight;
  const bool k_major = w.k_stride == 1;
  return {.data = w.data,
          .dtype = w.dtype,
          .rank = 3,
          .sizes = {k_major ? p.k : p.n, k_major ? p.n : p.k, p.num_experts},
          .strides = {k_major ? w.n_stride : w.k_stride, w.expert_stride},
          .box = {64, k_major ? cols / 2 : 64, 1}};
}

BoxedTensor boxed_rows(const GroupedGemmParams& p, int rows) {
  return {.data = p.a.rows.data,
          .dtype = p.a.rows.dtype,
          .rank = 2,
          .sizes = {p.k, p.num_rows, 1},
          .strides = {p.a.rows.stride, 0},
          .box = {64, rows, 1}};
}

bool takes(const GroupedGemmParams& p, const Device& device) {
  const Dtype dtype = p.a.rows.dtype;
  if (device.arch() != 90 || (dtype != Dtype::bfloat16 && dtype != Dtype::float16)) return false;
  if (p.weight.dtype != dtype || p.a.scale || (p.weight.k_stride != 1 && p.weight.n_stride != 1)) return false;
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 256;  // coordinates of boxes have 32 bits
  if (p.num_experts < 1 || p.n < 1 || p.k < 1 || p.n > most || p.k > most || p.num_rows > most) return false;
  const bool rows = p.a.row_slot ? rows_are_aligned(p.a) && p.a.rows.stride < most : has_tensor_map(boxed_rows(p, 128));
  return rows && weights_are_aligned(p) && has_tensor_map(boxed_weights(p, 128));
}

HopperGemmProblem problem_of(const GroupedGemmParams& p) {
  return {.rows = p.num_rows, .experts = p.num_experts, .n = p.n, .k = p.k, .epilogue = p.epilogue};
}

template <class T, class Config, bool k_major>
void start(const GroupedGemmParams& p, const Device& device) {
  constexpr HopperTiles tiles = Config::value;
  using Shared = HopperGemmShared<T, Config, k_major>;
  static_assert(sizeof(Shared) <= 227 * 1024);
  HopperGemmLaunch at{.p = p,
                      .grid = tile_grid(p, tiles.rows, tiles.cols),
                      .parts = nullptr,
                      .rows_by_tma = !p.a.row_slot,
                      .cluster = 1,
                      .row_boxes = {},
                      .weight_boxes = tensor_map(boxed_weights(p, tiles.cols), "grouped_gemm")};
  const int col_tiles = at.grid.col_tiles();
  if (p.grad_score) at.parts = static_cast<float*>(device.scratch(p.num_rows * col_tiles * int64_t(sizeof(float))));
  if (at.rows_by_tma) at.row_boxes = tensor_map(boxed_rows(p, tiles.rows), "grouped_gemm");
  const auto kernel = grouped_gemm_sm90_kernel<T, Config, k_major>;
  Launch how{.block = unsigned(tiles.kThreads),
             .shared_bytes = sizeof(Shared),
             .stream = device.stream(),
             .cluster = 2,
             .early = device.starts_early()};
  const int clusters = at.rows_by_tma ? resident_clusters(how, kernel) : 0;
  at.cluster = pick_hopper_cluster(device.processors(), clusters, problem_of(p), !at.rows_by_tma);
  const int most = at.cluster == 1 ? device.processors() : 2 * clusters;
  how.cluster = unsigned(at.cluster);
  how.grid = unsigned(ceil_div(std::min(at.grid.most_tiles(), most), at.cluster) * at.cluster);
  launch(how, kernel, at);
  if (p.grad_score) sum_score_gradients(p, at.parts, col_tiles, device);
}

template <class T>
void choose(const GroupedGemmParams& p, const Device& device) {
  HopperTiles tiles = kSharedTiles;  // one choice for all numbers of rows: the score gradient is summed by tiles
  if (!p.batch_invariant) tiles = pick_hopper_tiles(device.processors(), problem_of(p));
  std::visit(
      [&](auto k_major) {
        if (tiles == kSharedTiles) start<T, SharedTiles, k_major>(p, device);
        else start<T, TilesInTurns, k_major>(p, device);
      },
      flag(p.weight.k_stride == 1));
}

}  // namespace

bool grouped_gemm_sm90(const GroupedGemmParams& p, const Device& device) {
  if (!takes(p, device)) return false;
  if (p.a.rows.dtype == Dtype::bfloat16) choose<__nv_bfloat16>(p, device);
  else choose<__half>(p, device);
  return true;
}

}  // namespace moe
