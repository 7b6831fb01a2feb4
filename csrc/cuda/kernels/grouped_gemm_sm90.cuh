// The ragged-M grouped GEMM on sm_90a: out[r] = epilogue(a[r] . W_e^T + bias_e). Blocks walk over tiles. One warpgroup
// fills a ring of stages; two multiply them with wgmma, share a tile or take turns, and finish it from their registers
// while the next one's stages fill.
#pragma once

#include "cuda/arch/cluster.cuh"
#include "cuda/arch/launch.cuh"
#include "cuda/arch/mbarrier.cuh"
#include "cuda/arch/named_barrier.cuh"
#include "cuda/arch/proxy.cuh"
#include "cuda/arch/registers.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/kernels/epilogue_sm90.cuh"
#include "cuda/kernels/gemm_loads_sm90.cuh"
#include "cuda/kernels/stage_ring.cuh"
#include "cuda/kernels/turn.cuh"

namespace moe {

template <class T, class Config, bool k_major>
struct HopperGemmShared {
  static constexpr HopperTiles tiles = Config::value;
  static constexpr int kConsumerRows = tiles.consumer_rows();

  struct Stage {
    Panels<T, 64, tiles.rows> a;
    WeightStep<T, Config, k_major> b;
  };
  Stage stages[tiles.stages];
  arch::Barrier full[tiles.stages], empty[tiles.stages];
  arch::Barrier turn[HopperTiles::kConsumers];
  float bias[HopperTiles::kConsumers][tiles.cols];
};

// Rows of A that lie one after another: one thread starts the boxes of both operands.
template <class T, class Config, bool k_major>
MOE_INLINE void load_boxes(const HopperGemmLaunch& at, HopperGemmShared<T, Config, k_major>& shared) {
  constexpr HopperTiles tiles = Config::value;
  const GroupedGemmParams& p = at.p;
  if (threadIdx.x >= 32) return;
  StageRing<tiles.stages> ring;
  TileWalk walk(at.grid);
  for (int index = int(blockIdx.x); walk.seek(index) && walk.tile().expert < p.num_experts; index += int(gridDim.x)) {
    const Tile& tile = walk.tile();
    const WeightColumns columns = weight_columns(p, tile, tiles.cols);
    const WeightHalves halves = weight_halves(at, tile);
    for (int k = 0; k < int(p.k); k += tiles.kDepth, ring.advance()) {
      auto& stage = shared.stages[ring.stage];
      auto& full = shared.full[ring.stage];
      shared.empty[ring.stage].wait(ring.parity ^ 1);
      arch::sync_warp();  // parity tells only neighbouring rounds apart, so that no lane may stay behind
      if (threadIdx.x == 0) {
        full.arrive_expect_bytes(sizeof(stage.b) + sizeof(stage.a));
        load_weights(stage.b, at, full, columns, halves, k, tile.expert);
        arch::tma_load(stage.a.values[0], at.row_boxes, full, k, int(tile.row_begin));
      }
    }
  }
}

// Rows that are gathered: every thread copies some, one starts the boxes of the weights.
template <class T, class Config, bool k_major>
MOE_INLINE void load_gathered(const HopperGemmLaunch& at, HopperGemmShared<T, Config, k_major>& shared) {
  constexpr HopperTiles tiles = Config::value;
  const GroupedGemmParams& p = at.p;
  GatheredRowLoader<T, tiles.rows> rows(p.a, p.k);
  StageRing<tiles.stages> ring;
  TileWalk walk(at.grid);
  int index = int(blockIdx.x);
  const auto seek = [&] {
    const bool found = walk.seek(index) && walk.tile().expert < p.num_experts;
    if (found) rows.find(walk.tile());
    index += int(gridDim.x);
    return found;
  };
  for (bool more = seek(); more;) {
    const Tile tile = walk.tile();
    const WeightColumns columns = weight_columns(p, tile, tiles.cols);
    rows.begin(tile.rows);
    more = seek();
    for (int k = 0; k < int(p.k); k += tiles.kDepth, ring.advance()) {
      auto& stage = shared.stages[ring.stage];
      auto& full = shared.full[ring.stage];
      shared.empty[ring.stage].wait(ring.parity ^ 1);
      arch::sync_warp();  // its copies go together; none can stay behind, as `full` waits for all
      if (threadIdx.x == 0) {
        full.arrive_expect_bytes(sizeof(stage.b));
        load_weights(stage.b, at, full, columns, WeightHalves::both, k, tile.expert);
      }
      rows.load(stage.a, k);
      full.arrive_after_copies();
    }
  }
}

// The steps of a reduction, to sums that were cleared. Consumers that take turns wait for each other's last step: who
// ran ahead would take a phase of `full` that is two rounds old, and of the same parity, for its own.
// gathers: std::true_type where A came by cp.async. release: says that a stage has been read. beside: what is done
// while the first step is multiplied.
template <class T, class Config, bool k_major>
MOE_INLINE void multiply_steps(HopperGemmShared<T, Config, k_major>& shared, StageRing<Config::value.stages>& ring,
                               int steps, int consumer, auto gathers, auto& sums, auto release, auto beside) {
  constexpr HopperTiles tiles = Config::value;
  const int row = tiles.in_turns ? 0 : consumer * HopperGemmShared<T, Config, k_major>::kConsumerRows;
  using Stage = typename HopperGemmShared<T, Config, k_major>::Stage;
  constexpr uint32_t kStepOfB = k_major ? 32 : 16 * 128;  // bytes between 16 of k and the next
  Stage& first = shared.stages[0];
  const uint64_t a = arch::wgmma_along_k(first.a.values[0][row]);
  const uint64_t b =
      k_major ? arch::wgmma_along_k(first.b.values) : arch::wgmma_across_k(first.b.values, first.b.kBytes);
  const auto begin = [&] {
    shared.full[ring.stage].wait(ring.parity);
    if constexpr (decltype(gathers)::value) arch::fence_async_proxy();  // wgmma reads otherwise than cp.async writes
    sums.hold();
    arch::wgmma_fence();
    const uint32_t chunks = uint32_t(ring.stage) * uint32_t(sizeof(Stage) / 16);
    const uint64_t rows = arch::wgmma_advance_chunks(a, chunks), cols = arch::wgmma_advance_chunks(b, chunks);
#pragma unroll
    for (int k = 0; k < tiles.kDepth / 16; ++k)
#pragma unroll
      for (int block = 0; block < sums.kBlocks; ++block)
        arch::wgmma<T, tiles.cols, false, !k_major>(sums.values[block],
                                                    arch::wgmma_advance(rows, block * 64 * 128 + k * 32),
                                                    arch::wgmma_advance(cols, k * kStepOfB));
    arch::wgmma_commit();
  };
  begin();
  beside();
#pragma unroll 4
  for (int step = 1; step < steps; ++step) {
    const int before = ring.stage;
    ring.advance();
    begin();
    arch::wgmma_wait<1>();
    release(before);
  }
  if (tiles.in_turns && arch::lane_id() == 0) shared.turn[1 - consumer].arrive();
  arch::wgmma_wait<0>();
  sums.hold();
  release(ring.stage);
  ring.advance();
}

template <class T, class Config, bool k_major>
MOE_INLINE void multiply_tiles(const HopperGemmLaunch& at, HopperGemmShared<T, Config, k_major>& shared, int consumer) {
  constexpr HopperTiles tiles = Config::value;
  const GroupedGemmParams& p = at.p;
  constexpr int rows = HopperGemmShared<T, Config, k_major>::kConsumerRows;
  const int steps = int(ceil_div(p.k, tiles.kDepth)), row_begin = tiles.in_turns ? 0 : consumer * rows;
  const int turns = tiles.in_turns ? tiles.kConsumers : 1;
  const Lanes lanes{.warp = int(threadIdx.x) / 32 % (tiles.in_turns ? 4 : 8), .warps = tiles.in_turns ? 4 : 8};
  WarpgroupSums<rows / 64, tiles.cols> sums;
  StageRing<tiles.stages> ring;
  uint32_t turn = 0;  // parity
  const uint32_t rank = arch::block_in_cluster();
  TileWalk walk(at.grid);
  int index = int(blockIdx.x);
  if (tiles.in_turns && consumer > 0) index += int(gridDim.x), ring.skip(steps);
  for (; walk.seek(index); index += turns * int(gridDim.x)) {
    const Tile tile = walk.tile();
    if (tile.expert == p.num_experts) {
      zero_tile<T>(p, tile, lanes);
      continue;
    }
    float* const bias = shared.bias[consumer];
    const WeightColumns columns = weight_columns(p, tile, tiles.cols);
    arch::sync_threads(1 + consumer, 128);  // the last tile's biases are read
    for (int col = int(threadIdx.x) % 128; col < tiles.cols; col += 128)
      bias[col] = p.bias.data ? read(p.bias, tile.expert * p.n + columns.template at<tiles.cols>(col)) : 0;
    arch::sync_threads(1 + consumer, 128);  // this one's are written
    sums.clear();
    if (tiles.in_turns) {
      shared.turn[consumer].wait(turn ^ (consumer == 0));  // the first is consumer 0's, and need not wait
      turn ^= 1;
    }
    // A stage has been read when the warps of both blocks have said so, each to both: either may be the next to write
    // it. The last tile of all may have no neighbour: its block says it twice to itself.
    const bool alone = at.cluster == 1 || (rank == 0 && !tile.before_like &&
                                           !(walk.seek(index + 1) && walk.tile().expert < p.num_experts));
    const arch::BarriersOfBlock told(shared.empty[0], alone ? rank : uint32_t(arch::lane_id()) % 2);
    const auto release = [&](int stage) {
      if (arch::lane_id() < at.cluster) told.arrive_at(shared.empty[stage]);
    };
    const auto beside = [&] { ask_for_pre<T>(p, tile, row_begin, rows); };
    if (at.rows_by_tma)
      multiply_steps<T, Config, k_major>(shared, ring, steps, consumer, std::false_type{}, sums, release, beside);
    else multiply_steps<T, Config, k_major>(shared, ring, steps, consumer, std::true_type{}, sums, release, beside);
    if (tiles.in_turns) ring.skip(steps);
    finish_sums<T>(p, tile, row_begin, sums, bias, at.parts, at.grid.col_tiles());
  }
}

template <class T, class Config, bool k_major>
__global__ void __launch_bounds__(HopperTiles::kThreads, 1)
    grouped_gemm_sm90_kernel(const __grid_constant__ HopperGemmLaunch at) {
  constexpr HopperTiles tiles = Config::value;
  auto& shared = arch::shared<HopperGemmShared<T, Config, k_major>>();
  if (threadIdx.x == 0) {
    arch::prefetch(at.weight_boxes);
    if (at.rows_by_tma) arch::prefetch(at.row_boxes);
    for (int stage = 0; stage < tiles.stages; ++stage) {
      shared.full[stage].init(at.rows_by_tma ? 1 : 1 + 128);  // the one that counts bytes, and every thread that copies
      shared.empty[stage].init(at.cluster * (tiles.in_turns ? 4 : 4 * tiles.kConsumers));
    }
    for (arch::Barrier& turn : shared.turn) turn.init(4);
    arch::fence_barrier_init();
  }
  if (at.cluster == 1) arch::sync_block();  // the barriers are there
  else arch::sync_cluster();
  take_turn();

  const int warpgroup = arch::shuffle(int(threadIdx.x) / 128, 0);  // that the compiler sees it is one for the warp
  if (warpgroup == 0) {
    arch::give_registers<tiles.kProducerRegisters>();
    if (at.rows_by_tma) load_boxes(at, shared);
    else load_gathered(at, shared);
  } else {
    arch::take_registers<tiles.kConsumerRegisters>();
    multiply_tiles(at, shared, warpgroup - 1);
  }
  if (at.cluster > 1) arch::sync_cluster();  // a neighbour writes here, and arrives, until it has ended too
}

}  // namespace moe
