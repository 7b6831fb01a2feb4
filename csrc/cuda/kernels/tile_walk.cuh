// Which part of a ragged product a block computes, found on the device: the offsets are read once, in order, as the
// walk passes the experts.
#pragma once

#include "cuda/kernels/offsets.cuh"
#include "cuda/kernels/warp.cuh"
#include "stages/params.h"

namespace moe {

// Rows row_begin.. of one expert; behind the last expert stand the rows of none.
struct Tile {
  int expert;
  int64_t row_begin, col_begin;
  int rows, cols;                // of the result, at most those of the walk's tiles
  bool after_like, before_like;  // whether the walk's tile before this one, and the next, multiply the same weights
};

// How the result is cut into tiles.
struct TileGrid {
  const int32_t* offsets;  // [num_experts + 1]
  int num_experts;
  int64_t num_rows, num_cols;
  int rows, cols;  // of a tile

  // At least one tile per row block, so that a result without columns is walked too.
  __host__ __device__ int col_tiles() const { return num_cols > cols ? int((num_cols + cols - 1) / cols) : 1; }
  // Known without the offsets: every expert and the rows of none may end with a part of a tile. Tiles are counted in
  // 32 bits: no memory holds 2^31 of them.
  __host__ __device__ int most_tiles() const {
    const int64_t ends = num_experts + 1 < num_rows ? num_experts + 1 : num_rows;
    return int(num_rows / rows + ends) * col_tiles();
  }
};

// Tiles in order of experts. Every warp walks by itself, its lanes reading the offsets of 32 experts at a time.
class TileWalk {
 public:
  __device__ explicit TileWalk(const TileGrid& grid) : grid_(grid) { read_experts(); }

  // Moves on to the tile of this index, which must not fall; false behind the last.
  __device__ bool seek(int index) {
    for (;;) {
      const int passed = tiles_before_ + arch::shuffle(tiles_, 31);
      if (index < passed) break;
      if (first_expert_ + 32 > grid_.num_experts) return false;
      tiles_before_ = passed;
      rows_before_ = arch::shuffle(end_, 31);
      first_expert_ += 32;
      read_experts();
    }
    const int lane = arch::lowest_bit(arch::ballot(index < tiles_before_ + tiles_)), below = lane > 0 ? lane - 1 : 0;
    const int tiles = arch::shuffle(tiles_, below), begin = arch::shuffle(end_, below);
    const int first = tiles_before_ + (lane > 0 ? tiles : 0);
    place(first_expert_ + lane, index - first, lane > 0 ? begin : rows_before_, arch::shuffle(end_, lane));
    return true;
  }

  __device__ const Tile& tile() const { return tile_; }

 private:
  // Row tiles that share weights go side by side, as many at a time as leave their rows in the cache.
  static constexpr int kRowTilesTogether = 16;

  __device__ int row_tiles(int begin, int end) const {
    return (end - begin) / grid_.rows + ((end - begin) % grid_.rows > 0);
  }

  // Lane i has the end of expert first_expert + i and the number of tiles up to there.
  __device__ void read_experts() {
    const int lane = arch::lane_id(), expert = first_expert_ + lane;
    end_ = expert < grid_.num_experts ? own_end(grid_.offsets, expert, grid_.num_rows) : int(grid_.num_rows);
    end_ = max(end_, rows_before_);
    for (int distance = 1; distance < 32; distance *= 2) end_ = max(end_, arch::shuffle_up(end_, distance));
    const int before = arch::shuffle_up(end_, 1);
    tiles_ = scan_warp(row_tiles(lane > 0 ? before : rows_before_, end_) * grid_.col_tiles());
  }

  // The tile of this index among those of an expert.
  __device__ void place(int expert, int index, int begin, int end) {
    const int col_tiles = grid_.col_tiles(), first = index / (kRowTilesTogether * col_tiles) * kRowTilesTogether;
    const int together = min(row_tiles(begin, end) - first, kRowTilesTogether), within = index - first * col_tiles;
    const int row_tile = within % together;
    const int64_t row = int64_t(first + row_tile) * grid_.rows, col = int64_t(within / together) * grid_.cols;
    tile_ = {.expert = expert,
             .row_begin = begin + row,
             .col_begin = col,
             .rows = int(min(end - begin - row, int64_t(grid_.rows))),
             .cols = int(min(grid_.num_cols - col, int64_t(grid_.cols))),
             .after_like = row_tile > 0,
             .before_like = row_tile + 1 < together};
  }

  const TileGrid& grid_;
  int first_expert_ = 0, rows_before_ = 0, tiles_before_ = 0;
  int end_ = 0, tiles_ = 0;
  Tile tile_{};
};

}  // namespace moe
