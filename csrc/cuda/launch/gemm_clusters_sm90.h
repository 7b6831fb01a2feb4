// Which ragged-M GEMMs on sm_90a run as clusters of two blocks that fetch weights for one another: a pure function.
#pragma once

#include <algorithm>

#include "cuda/launch/gemm_tiles_sm90.h"

namespace moe {

// Blocks in a cluster, of a card that holds `clusters` of two at once. An expert should have two tiles of rows for a
// pair to share its weights: below 256 rows an expert memory is the bound, not L2. Nothing is multiplied twice or
// for nothing, so that all it may cost is the processors that no cluster fits on, taken to be worth it up to a
// sixteenth, and that two blocks wait for one another: guesses until they are measured.
constexpr int pick_hopper_cluster(int processors, int clusters, const HopperGemmProblem& problem, bool gathers) {
  const bool pairs = problem.rows >= 256 * std::max<int64_t>(problem.experts, 1);
  return !gathers && pairs && 32 * int64_t(clusters) >= 15 * int64_t(processors) ? 2 : 1;
}

}  // namespace moe
