// Which tiles a ragged-M GEMM is cut into on sm_90a: a pure function of the card's size and the problem.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/gemm_tiles_sm90.h"

namespace moe {

struct HopperGemmProblem {
  int64_t rows, experts, n, k;
};

// What the busiest processor spends, in steps of a [128, 128] tile, where every expert wastes half a tile behind its
// last row. Tiles of [128, 128] fetch four thirds of the bytes for a product: a quarter more time is assumed. Writing a
// tile of [128, 256] is taken to last as long as eight such steps, hidden but for the last tile where consumers take
// turns. Guesses until they are measured.
constexpr int64_t cost_of(const HopperTiles& tiles, const HopperGemmProblem& problem, int processors) {
  const auto ratio = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t wasted = std::min(problem.experts, problem.rows) * tiles.rows;
  const int64_t row_tiles = ratio(2 * problem.rows + wasted, 2 * tiles.rows);
  const int64_t turns = ratio(row_tiles * ratio(problem.n, tiles.cols), processors);
  const int64_t steps = ratio(problem.k, HopperTiles::kDepth);
  return tiles.in_turns ? 5 * turns * steps + 4 * 4 : 4 * turns * (2 * steps + 8);
}

constexpr HopperTiles pick_hopper_tiles(int processors, const HopperGemmProblem& problem) {
  return cost_of(kTilesInTurns, problem, processors) < cost_of(kSharedTiles, problem, processors) ? kTilesInTurns
                                                                                                  : kSharedTiles;
}

}  // namespace moe
