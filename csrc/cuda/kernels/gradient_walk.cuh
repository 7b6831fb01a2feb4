// Which tile of which expert's gradient a block computes. A tile costs as many steps as its expert has rows: experts
// with most rows come first, so that the last tiles, which blocks end with at different times, are the cheapest.
#pragma once

#include "cuda/kernels/offsets.cuh"
#include "cuda/kernels/warp.cuh"

namespace moe {

inline constexpr int kMostRankedExperts = 1024;

// In shared memory: where the rows of experts end, and the experts by their number of rows, each looked for in sorted
// runs of 32.
struct RankedExperts {
  int32_t ends[kMostRankedExperts];
  int32_t ranked[kMostRankedExperts];  // most rows first; of equals the lowest id

  __device__ int32_t begin(int expert) const { return expert > 0 ? ends[expert - 1] : 0; }

  // By all threads of the block.
  __device__ void read(const int32_t* offsets, int experts, int64_t num_rows) {
    if (warp_id() == 0) {
      int32_t before = 0;
      for (int first = 0; first < experts; first += 32) {
        const int expert = first + arch::lane_id();
        int32_t end = max(before, expert < experts ? own_end(offsets, expert, num_rows) : 0);
        for (int distance = 1; distance < 32; distance *= 2) end = max(end, arch::shuffle_up(end, distance));
        if (expert < experts) ends[expert] = end;
        before = arch::shuffle(end, 31);
      }
    }
    arch::sync_block();  // the ends are written
    for (int first = 32 * warp_id(); first < experts; first += int(blockDim.x)) {
      const int64_t own = key(first + arch::lane_id(), experts);
      int place = 0;
      for (int lane = 0; lane < 32; ++lane) place += arch::shuffle(own, lane) > own;
      keys[first + place] = own;
    }
    arch::sync_block();  // every 32 keys are sorted
    for (int expert = int(threadIdx.x); expert < experts; expert += int(blockDim.x)) {
      const int64_t own = key(expert, experts);
      int rank = 0;
      for (int first = 0; first < experts; first += 32) {
        int larger = 0;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) larger += keys[first + larger + step - 1] > own ? step : 0;
        rank += larger + (keys[first + larger] > own);
      }
      ranked[rank] = expert;
    }
    arch::sync_block();  // the ranks are written
  }

 private:
  int64_t keys[kMostRankedExperts];

  // Larger for more rows, and of equals for the lower id; none are equal, those of no expert the smallest.
  __device__ int64_t key(int expert, int experts) const {
    if (expert >= experts) return -1 - expert;
    return int64_t(ends[expert] - begin(expert)) * kMostRankedExperts + (kMostRankedExperts - 1 - expert);
  }
};

// How all gradients are cut. Tiles are counted in 32 bits: no memory holds 2^31 of them.
struct GradientTiles {
  int experts, n_tiles, k_tiles;
  int band;  // tiles along N that run side by side, so that the blocks of a wave read few columns of either operand

  __host__ __device__ int count() const { return experts * n_tiles * k_tiles; }
};

// A block's tiles, in turn.
class GradientWalk {
 public:
  int expert, n_tile, k_tile;
  RowRange rows;

  __device__ GradientWalk(const GradientTiles& tiles, const RankedExperts& experts)
      : tiles_(tiles), experts_(experts) {}

  // False behind the last. Every other round is dealt backwards, or the first block would have the most each time.
  __device__ bool next() {
    const int blocks = int(gridDim.x), block = int(blockIdx.x);
    const int index = round_ * blocks + (round_ % 2 ? blocks - 1 - block : block);
    ++round_;
    if (index >= tiles_.count()) return false;
    const int of_expert = tiles_.n_tiles * tiles_.k_tiles, i = index % of_expert;
    const int first = i / (tiles_.band * tiles_.k_tiles) * tiles_.band,
              side_by_side = min(tiles_.band, tiles_.n_tiles - first);
    const int within = i - first * tiles_.k_tiles;
    expert = experts_.ranked[index / of_expert];
    n_tile = first + within % side_by_side, k_tile = within / side_by_side;
    rows = {experts_.begin(expert), experts_.ends[expert]};
    return true;
  }

 private:
  const GradientTiles& tiles_;
  const RankedExperts& experts_;
  int round_ = 0;
};

}  // namespace moe
