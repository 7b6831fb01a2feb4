// The weight gradient on sm_90a: out[e] = grad^T . a over the rows of expert e. Blocks walk over tiles. One warpgroup
// fills a ring of stages, by TMA where whole steps of rows lie one after another, by cp.async where they are gathered
// or end; two multiply them with wgmma, both operands across their rows, and store their halves of the tile by
// themselves.
#pragma once

#include "cuda/arch/launch.cuh"
#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/proxy.cuh"
#include "cuda/arch/registers.cuh"
#include "cuda/arch/tma.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/kernels/gradient_epilogue.cuh"
#include "cuda/kernels/gradient_walk.cuh"
#include "cuda/kernels/panels.cuh"
#include "cuda/kernels/stage_ring.cuh"
#include "cuda/kernels/turn.cuh"
#include "cuda/kernels/weight_grad_tiles.h"

namespace moe {

struct HopperGradLaunch {
  WeightGradParams p;
  GradientTiles tiles;
  bool grad_by_tma, a_by_tma;           // neither gathered nor scaled
  arch::TensorMap grad_boxes, a_boxes;  // [rows, 64 columns], where by TMA
};

template <class T, class Config>
struct HopperGradShared {
  static constexpr WeightGradTiles tiles = Config::value;

  struct Stage {
    Panels<T, tiles.n, tiles.depth> grad;
    Panels<T, tiles.k, tiles.depth> a;
  };
  Stage stages[tiles.stages];
  // Nobody waits for the last of empty, which stands for the stage before a first step: so there is nothing to ask.
  arch::Barrier full[tiles.stages], empty[tiles.stages + 1];
  RankedExperts experts;
};

MOE_INLINE bool scales(const WeightGradParams& p) { return p.grad.scale.data || p.a.scale.data; }

// A whole step of an operand that lies as it is read.
template <class T, int cols, int depth>
MOE_INLINE void load_boxes(Panels<T, cols, depth>& to, const arch::TensorMap& boxes, arch::Barrier& landed, int col,
                           int row) {
#pragma unroll
  for (int panel = 0; panel < to.kCount; ++panel)
    arch::tma_load(to.values[panel], boxes, landed, col + panel * to.kCols, row);
}

template <class T, class Config>
MOE_INLINE void load_steps(const HopperGradLaunch& at, HopperGradShared<T, Config>& shared) {
  constexpr WeightGradTiles tiles = Config::value;
  const WeightGradParams& p = at.p;
  PanelLoader<T, tiles.n, tiles.depth> grad(p.grad, p.n);
  PanelLoader<T, tiles.k, tiles.depth> a(p.a, p.k);
  StageRing<tiles.stages> ring;
  GradientWalk walk(at.tiles, shared.experts);
  while (walk.next()) {
    const int n = walk.n_tile * tiles.n, k = walk.k_tile * tiles.k;
    grad.begin(walk.rows, n), a.begin(walk.rows, k);
    for (int64_t row = walk.rows.begin; row < walk.rows.end; row += tiles.depth, ring.advance()) {
      auto& stage = shared.stages[ring.stage];
      auto& full = shared.full[ring.stage];
      const bool whole = walk.rows.end - row >= tiles.depth;
      const bool grad_boxes = whole && at.grad_by_tma, a_boxes = whole && at.a_by_tma;
      shared.empty[ring.stage].wait(ring.parity ^ 1);
      if (threadIdx.x == 0) {
        full.arrive_expect_bytes(grad_boxes * sizeof(stage.grad) + a_boxes * sizeof(stage.a));
        if (grad_boxes) load_boxes(stage.grad, at.grad_boxes, full, n, int(row));
        if (a_boxes) load_boxes(stage.a, at.a_boxes, full, k, int(row));
      }
      if (!grad_boxes) grad.load(stage.grad, row);
      if (!a_boxes) a.load(stage.a, row);
      full.arrive_after_copies();
      if (scales(p)) full.arrive();  // for what went through registers
    }
  }
}

// The part of a tile that a warpgroup sums up: kBlocks times 64 of n by all k.
template <class T, class Config>
struct HopperGradSums {
  static constexpr WeightGradTiles tiles = Config::value;
  static constexpr int kBlocks = tiles.n / 64 / tiles.kConsumers;

  float values[kBlocks][tiles.k / 2];

  MOE_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
#pragma unroll
      for (int j = 0; j < tiles.k / 2; ++j) values[i][j] = 0;
  }

  MOE_INLINE void hold() {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) arch::wgmma_hold(values[i]);
  }

  // Begins to add a step, whose operands these describe: grad from this warpgroup's first panel on.
  MOE_INLINE void add(uint64_t grad, uint64_t a) {
    constexpr uint32_t kSixteenRows = 16 * 128, kPanel = 128 * tiles.depth;  // bytes
#pragma unroll
    for (int k = 0; k < tiles.depth / 16; ++k)
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
        arch::wgmma<T, tiles.k, true, true>(values[i], arch::wgmma_advance(grad, i * kPanel + k * kSixteenRows),
                                            arch::wgmma_advance(a, k * kSixteenRows));
    arch::wgmma_commit();
  }
};

template <class S, class Sums>
MOE_INLINE void store_sums(const WeightGradParams& p, int expert, int64_t n, int64_t k, const Sums& sums) {
  GradientRows<S> to{.out = static_cast<S*>(p.out) + (expert * p.n + n) * p.k + k,
                     .stride = p.k,
                     .rows = p.n - n,
                     .cols = p.k - k,
                     .accumulate = p.accumulate};
#pragma unroll
  for (int i = 0; i < Sums::kBlocks; ++i) {
    to.store(sums.values[i]);
    to.out += 64 * to.stride, to.rows -= 64;
  }
}

template <class T, class Config>
MOE_INLINE void multiply_steps(const HopperGradLaunch& at, HopperGradShared<T, Config>& shared, int consumer) {
  constexpr WeightGradTiles tiles = Config::value;
  const WeightGradParams& p = at.p;
  using Sums = HopperGradSums<T, Config>;
  Sums sums;
  StageRing<tiles.stages> ring;
  GradientWalk walk(at.tiles, shared.experts);
  auto& first = shared.stages[0];
  // Shuffled, so that the compiler takes them for the warp's and neither computes them again nor keeps a lane's copy.
  const uint64_t grad =
      arch::shuffle(arch::wgmma_across_k(first.grad.values[consumer * Sums::kBlocks], first.grad.kBytes), 0);
  const uint64_t a = arch::shuffle(arch::wgmma_across_k(first.a.values, first.a.kBytes), 0);
  const bool releases = arch::lane_id() == 0;
  while (walk.next()) {
    const int rows = int(walk.rows.end - walk.rows.begin), steps = int(ceil_div(rows, tiles.depth));
    if (p.accumulate && rows == 0) continue;
    const int steps_by_tma = at.grad_by_tma && at.a_by_tma ? rows / tiles.depth : 0;
    sums.clear();
    int before = tiles.stages;  // the stage that is still being read
    const auto multiply = [&](bool copied) {
      shared.full[ring.stage].wait(ring.parity);
      if (copied) arch::fence_async_proxy();  // wgmma reads otherwise than cp.async and stores write
      sums.hold();
      arch::wgmma_fence();
      const uint32_t chunks = uint32_t(ring.stage) * uint32_t(sizeof(first) / 16);
      sums.add(arch::wgmma_advance_chunks(grad, chunks), arch::wgmma_advance_chunks(a, chunks));
      arch::wgmma_wait<1>();
      if (releases) shared.empty[before].arrive();
      before = ring.stage;
      ring.advance();
    };
    const auto finish = [&] {
      arch::wgmma_wait<0>();
      sums.hold();
      if (releases) shared.empty[before].arrive();
      before = tiles.stages;
    };
#pragma unroll 4
    for (int step = 0; step < steps_by_tma; ++step) multiply(false);
    finish();
#pragma unroll 4
    for (int step = steps_by_tma; step < steps; ++step) multiply(true);
    finish();
    const int64_t n = walk.n_tile * tiles.n + consumer * Sums::kBlocks * 64, k = walk.k_tile * tiles.k;
    if (p.out_dtype == Dtype::float32) store_sums<float>(p, walk.expert, n, k, sums);
    else store_sums<T>(p, walk.expert, n, k, sums);
  }
}

template <class T, class Config>
__global__ void __launch_bounds__(WeightGradTiles::kThreads, 1)
    grouped_gemm_weight_grad_sm90_kernel(const __grid_constant__ HopperGradLaunch at) {
  constexpr WeightGradTiles tiles = Config::value;
  auto& shared = arch::shared<HopperGradShared<T, Config>>();
  if (threadIdx.x == 0) {
    if (at.grad_by_tma) arch::prefetch(at.grad_boxes);
    if (at.a_by_tma) arch::prefetch(at.a_boxes);
    const int arrivals = 1 + 128 * (scales(at.p) ? 2 : 1);  // the one that counts bytes, and every thread that copies
    for (int stage = 0; stage < tiles.stages; ++stage) {
      shared.full[stage].init(arrivals);
      shared.empty[stage].init(4 * tiles.kConsumers);
    }
    shared.empty[tiles.stages].init(4 * tiles.kConsumers);
    arch::fence_barrier_init();
  }
  take_turn();
  shared.experts.read(at.p.offsets, at.tiles.experts, at.p.num_rows);  // and behind its barrier the others are there

  const int warpgroup = arch::shuffle(int(threadIdx.x) / 128, 0);  // so that the compiler knows it for a warp's
  if (warpgroup == 0) {
    arch::give_registers<56>();
    load_steps(at, shared);
  } else {
    arch::take_registers<224>();
    multiply_steps(at, shared, warpgroup - 1);
  }
}

}  // namespace moe
