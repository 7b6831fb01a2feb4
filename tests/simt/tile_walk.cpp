// The walks over the tiles of a grouped GEMM, for tests: which tile stands at each index.
#include "cuda/kernels/tile_walk.cuh"
#include "cuda/kernels/gradient_walk.cuh"

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

// What blocks meet in turn, [rounds, blocks]; tiles that there are none of stay as they are.
__global__ void walk_gradients(GradientTiles tiles, const int32_t* offsets, int64_t num_rows, Tile* out) {
  auto& experts = arch::shared<RankedExperts>();
  experts.read(offsets, tiles.experts, num_rows);
  GradientWalk walk(tiles, experts);
  for (int at = int(blockIdx.x); walk.next(); at += int(gridDim.x))
    if (threadIdx.x == 0)
      out[at] = {.expert = walk.expert,
                 .row_begin = walk.rows.begin,
                 .col_begin = walk.n_tile * tiles.k_tiles + walk.k_tile,
                 .rows = int(walk.rows.end - walk.rows.begin)};
}

}  // namespace

}  // namespace moe

// out [count, 6]: expert, first row, first column, rows, columns, whether the tile before (1) and the next (2) multiply
// the same weights. Returns how many tiles there may be; without `out` nothing is walked.
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
  moe::check(cudaStreamSynchronize(nullptr));
  for (const moe::Tile& tile : tiles)
    for (int64_t value : {int64_t(tile.expert), tile.row_begin, tile.col_begin, int64_t(tile.rows), int64_t(tile.cols),
                          int64_t(tile.after_like + 2 * tile.before_like)})
      *out++ = value;
  return count;
}

// out [rounds, blocks, 4]: expert, tile within it, first row, rows; -1 as expert where a block has ended. Returns how
// many there may be; without `out` nothing is walked.
extern "C" __attribute__((visibility("default"))) int64_t moe_ops_simt_gradient_tiles(const int32_t* offsets,
                                                                                      int experts, int64_t rows,
                                                                                      int n_tiles, int k_tiles,
                                                                                      int band, unsigned blocks,
                                                                                      int64_t* out) {
  const moe::GradientTiles tiles{.experts = experts, .n_tiles = n_tiles, .k_tiles = k_tiles, .band = band};
  const int64_t count = (tiles.count() + blocks - 1) / blocks * blocks;
  if (!out) return count;
  std::vector<moe::Tile> walked(count, moe::Tile{.expert = -1});
  moe::launch({.grid = blocks, .block = 64, .shared_bytes = sizeof(moe::RankedExperts)}, moe::walk_gradients, tiles,
              offsets, rows, walked.data());
  moe::check(cudaStreamSynchronize(nullptr));
  for (const moe::Tile& tile : walked)
    for (int64_t value : {int64_t(tile.expert), tile.col_begin, tile.row_begin, int64_t(tile.rows)}) *out++ = value;
  return count;
}
