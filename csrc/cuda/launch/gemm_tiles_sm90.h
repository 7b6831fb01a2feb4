// Which tiles a ragged-M GEMM is cut into on sm_90a: a pure function of the card's size and the problem.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/gemm_tiles_sm90.h"
#include "stages/params.h"

namespace moe {

struct HopperGemmProblem {
  int64_t rows, experts, n, k;
  Epilogue epilogue = Epilogue::store;
};

// Cycles of a step's products. The tensor cores take 1024 for [128, 256, 64] and 512 for [128, 128, 64], but shared
// memory moves 128 bytes a cycle: the wgmmas of a step read 80 or 48 KiB, and 48 or 32 KiB land.
constexpr int64_t step_cycles(const HopperTiles& tiles) { return tiles.in_turns ? 640 : 1024; }

// Instructions that a warp issues for its 128 sums a thread, counted in SASS (docs/kernels.md): 16 pieces of 50 to
// store them; with SiLU, gated, 8 of 258 where H is written too, and 16 of 377 backward.
constexpr int64_t epilogue_instructions(Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::store: return 16 * 50;
    case Epilogue::activate: return 8 * 258;
    default: return 16 * 377;
  }
}

// Cycles of the busiest processor, where every expert wastes half a tile behind its last row. Consumers that share a
// tile have two warps on a scheduler, and nothing is multiplied meanwhile; of those that take turns one multiplies
// while the other stores, but for the last tile.
constexpr double cost_of(const HopperTiles& tiles, const HopperGemmProblem& problem, int processors) {
  const auto ratio = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t wasted = std::min(problem.experts, problem.rows) * tiles.rows;
  const int64_t row_tiles = ratio(2 * problem.rows + wasted, 2 * tiles.rows);
  const int64_t turns = ratio(row_tiles * ratio(problem.n, tiles.cols), processors);
  const int64_t products = ratio(problem.k, HopperTiles::kDepth) * step_cycles(tiles);
  const int64_t stores = epilogue_instructions(problem.epilogue);
  const int64_t of_tile = tiles.in_turns ? std::max(products, (products + stores) / 2) : products + 2 * stores;
  return double(turns) * double(of_tile) + double(tiles.in_turns ? stores : 0);
}

constexpr HopperTiles pick_hopper_tiles(int processors, const HopperGemmProblem& problem) {
  return cost_of(kTilesInTurns, problem, processors) < cost_of(kSharedTiles, problem, processors) ? kTilesInTurns
                                                                                                  : kSharedTiles;
}

}  // namespace moe
