// Starts the weight gradient of sm_90a: as many blocks as there are processors.
#include "cuda/launch/grouped_gemm_weight_grad.h"

#include <algorithm>
#include <limits>

#include "cuda/kernels/grouped_gemm_weight_grad_sm90.cuh"
#include "cuda/launch/access.h"
#include "cuda/launch/tensor_map.h"
#include "cuda/launch/weight_grad_tiles.h"
#include "device.h"

namespace moe {

namespace {

bool by_tma(const GatheredRows& from) { return !from.row_slot && !from.scale; }

BoxedTensor boxed(const WeightGradParams& p, const GatheredRows& from, int64_t cols, int depth) {
  return {.data = from.rows.data,
          .dtype = from.rows.dtype,
          .rank = 2,
          .sizes = {cols, p.num_rows, 1},
          .strides = {from.rows.stride, 0},
          .box = {64, depth, 1}};
}

bool reachable(const WeightGradParams& p, const GatheredRows& from, int64_t cols) {
  return by_tma(from) ? has_tensor_map(boxed(p, from, cols, 64)) : has_aligned_rows(from.rows);
}

bool takes(const WeightGradParams& p, const Device& device) {
  const Dtype dtype = p.a.rows.dtype;
  if (device.arch() != 90 || (dtype != Dtype::bfloat16 && dtype != Dtype::float16)) return false;
  if (p.out_dtype != Dtype::float32 && (p.out_dtype != dtype || p.accumulate)) return false;
  constexpr int64_t most = std::numeric_limits<int32_t>::max() - 256;  // coordinates of boxes have 32 bits
  if (p.num_experts < 1 || p.num_experts > kMostRankedExperts || p.num_rows < 1 || p.num_rows > most) return false;
  if (p.n < 1 || p.k < 1 || p.n > most || p.k > most) return false;
  return p.n % 8 == 0 && p.k % 8 == 0 && is_aligned(p.out) && reachable(p, p.grad, p.n) && reachable(p, p.a, p.k);
}

template <class T, class Config>
void start(const WeightGradParams& p, const Device& device) {
  constexpr WeightGradTiles tiles = Config::value;
  using Shared = HopperGradShared<T, Config>;
  static_assert(sizeof(Shared) <= 227 * 1024);
  HopperGradLaunch at{.p = p,
                      .tiles = {.experts = int(p.num_experts),
                                .n_tiles = int(ceil_div(p.n, tiles.n)),
                                .k_tiles = int(ceil_div(p.k, tiles.k)),
                                .band = 2048 / tiles.n},
                      .grad_by_tma = by_tma(p.grad),
                      .a_by_tma = by_tma(p.a),
                      .grad_boxes = {},
                      .a_boxes = {}};
  if (at.grad_by_tma) at.grad_boxes = tensor_map(boxed(p, p.grad, p.n, tiles.depth), "grouped_gemm_weight_grad");
  if (at.a_by_tma) at.a_boxes = tensor_map(boxed(p, p.a, p.k, tiles.depth), "grouped_gemm_weight_grad");
  launch({.grid = unsigned(std::min(at.tiles.count(), device.processors())),
          .block = unsigned(tiles.kThreads),
          .shared_bytes = sizeof(Shared),
          .stream = device.stream(),
          .early = device.starts_early()},
         grouped_gemm_weight_grad_sm90_kernel<T, Config>, at);
}

template <class T>
void choose(const WeightGradParams& p, const Device& device) {
  const bool gathers_a = p.a.row_slot && !p.grad.row_slot;
  const WeightGradTiles tiles = pick_weight_grad_tiles(
      device.processors(), {.experts = p.num_experts, .n = p.n, .k = p.k, .gathers_a = gathers_a});
  if (tiles == kWideGradTiles) start<T, WideGradTiles>(p, device);
  else if (tiles == kTallGradTiles) start<T, TallGradTiles>(p, device);
  else start<T, SquareGradTiles>(p, device);
}

}  // namespace

bool grouped_gemm_weight_grad_sm90(const WeightGradParams& p, const Device& device) {
  if (!takes(p, device)) return false;
  if (p.a.rows.dtype == Dtype::bfloat16) choose<__nv_bfloat16>(p, device);
  else choose<__half>(p, device);
  return true;
}

}  // namespace moe
