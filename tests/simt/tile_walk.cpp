// The walk over the tiles of a grouped GEMM, for tests: which tile stands at each index.
#include "cuda/kernels/tile_walk.cuh"

#include "cuda/arch/launch.cuh"

namespace moe {

namespace {

// tiles [most tiles]: -1 as expert where the walk has ended. Blocks take every gridDim.x-th index, as a GEMM's do.
__global__ void walk_tiles(TileGrid grid, Tile* tiles) {
  TileWalk walk(grid);
  for (int index = int(blockIdx.x); index < grid.most_tiles(); index += int(gridDim.x)) {
    const Tile tile = walk.seek(index) ? walk.tile() : Tile{.expert = -1};
    if (arch::lane_id() == 0) tiles[index] = tile;
  }
}

}  // namespace

}  // namespace moe

// out [count, 5]: expert, first row, first column, rows, columns. Returns how many tiles there may be; without `out`
// nothing is walked.
extern "C" __attribute__((visibility("default"))) int64_t moe_ops_simt_tiles(const int32_t* offsets, int experts,
                                                                             int64_t rows, int64_t cols, int tile_rows,
                                                                             int tile_cols, unsigned blocks,
                                                                             int64_t* out) {
  const moe::TileGrid grid{.offsets = offsets,
                           .num_experts = experts,
                           .num_rows = rows,
                           .num_cols = cols,
                           .rows = tile_rows,
                           .cols = tile_cols};
  const int count = grid.most_tiles();
  if (!out) return count;
  std::vector<moe::Tile> tiles(count);
  moe::launch({.grid = blocks, .block = 32}, moe::walk_tiles, grid, tiles.data());
  for (const moe::Tile& tile : tiles)
    for (int64_t value : {int64_t(tile.expert), tile.row_begin, tile.col_begin, int64_t(tile.rows), int64_t(tile.cols)})
      *out++ = value;
  return count;
}
