// Which tiles a weight gradient is cut into on sm_90a: a pure function of the card's size and the problem. An element
// is summed in the same order whatever is chosen.
#pragma once

#include <cstdint>

#include "cuda/kernels/weight_grad_tiles.h"

namespace moe {

struct WeightGradProblem {
  int64_t experts, n, k;
  bool gathers_a;  // rather than grad
};

// What the busiest block multiplies, where all experts have as many rows. A square tile fetches four thirds of the
// bytes for a product and is taken to cost a quarter more; to be measured.
constexpr int64_t cost_of(const WeightGradTiles& tiles, const WeightGradProblem& problem, int processors) {
  const auto ratio = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t count = problem.experts * ratio(problem.n, tiles.n) * ratio(problem.k, tiles.k);
  return ratio(count, processors) * tiles.n * tiles.k * (tiles == kSquareGradTiles ? 5 : 4);
}

// Of equals the one whose narrow side is gathered.
constexpr WeightGradTiles pick_weight_grad_tiles(int processors, const WeightGradProblem& problem) {
  WeightGradTiles best = problem.gathers_a ? kTallGradTiles : kWideGradTiles;
  for (const WeightGradTiles& tiles : {kWideGradTiles, kTallGradTiles, kSquareGradTiles})
    if (cost_of(tiles, problem, processors) < cost_of(best, problem, processors)) best = tiles;
  return best;
}

}  // namespace moe
