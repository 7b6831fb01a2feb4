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

// What the busiest block multiplies, where all experts have as many rows. A step of a square tile costs a quarter more
// than the tensor cores take for it: 512 cycles, in which shared memory would move 48 KiB to wgmma and 32 KiB that
// land, 128 bytes a cycle. The others' 80 and 48 KiB take no longer than their 1024.
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
