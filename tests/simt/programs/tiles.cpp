// The grouped GEMM's choice of tiles, its walk over them, and TF32, which no operator asks for: prints a line for each,
// "right" or "wrong".
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/kernels/grouped_gemm.cuh"
#include "cuda/launch/gemm_config.h"
#include "device.h"

namespace {

using namespace moe;

constexpr GemmProblem kProblem{
    .dtype = Dtype::bfloat16, .rows = 65536, .experts = 128, .n = 1536, .k = 2048, .direct = true};
constexpr GemmConfig choice(auto change) {
  GemmProblem problem = kProblem;
  change(problem);
  return pick_config(80, problem);
}
static_assert(choice([](auto&) {}) == kLargeTiles);
static_assert(choice([](auto& p) { p.rows = 96 * 128; }) == kSmallTiles);
static_assert(choice([](auto& p) { p.dtype = Dtype::float16, p.direct = false; }) == kConvertingTiles);
static_assert(choice([](auto& p) { p.dtype = Dtype::float32; }) == kFloatTiles);
static_assert(choice([](auto& p) { p.dtype = Dtype::float32, p.allow_tf32 = true; }) == kTf32Tiles);
static_assert(choice([](auto& p) { p.dtype = Dtype::float32, p.allow_tf32 = true, p.direct = false; }) == kFloatTiles);

bool report(const char* what, bool right) {
  std::printf("%s: %s\n", what, right ? "right" : "wrong");
  return right;
}

// Blocks mark the elements of their tiles with the expert.
__global__ void walk_tiles(TileGrid grid, int* marks, int* visits) {
  TileWalk walk(grid);
  for (int index = int(blockIdx.x); walk.seek(index); index += int(gridDim.x)) {
    const Tile tile = walk.tile();
    for (int i = arch::lane_id(); i < tile.rows * tile.cols; i += 32) {
      const int64_t at = (tile.row_begin + i / tile.cols) * grid.num_cols + tile.col_begin + i % tile.cols;
      marks[at] = tile.expert, ++visits[at];
    }
  }
}

bool check_walk(const std::vector<int32_t>& offsets, int rows, int cols, unsigned blocks) {
  const int experts = int(offsets.size()) - 1;
  const TileGrid grid{
      .offsets = offsets.data(), .num_experts = experts, .num_rows = rows, .num_cols = cols, .rows = 16, .cols = 8};
  std::vector<int> marks(rows * cols, -1), visits(rows * cols, 0);
  launch({.grid = blocks, .block = 32}, walk_tiles, grid, marks.data(), visits.data());
  bool right = true;
  int end = 0, row = 0;
  for (int e = 0; e <= experts; ++e)
    for (end = e == experts ? rows : std::max(end, std::min(offsets[e + 1], rows)); row < end; ++row)
      for (int col = 0; col < cols; ++col) right &= marks[row * cols + col] == e && visits[row * cols + col] == 1;
  return right;
}

bool check_walks() {
  bool right =
      check_walk({0, 20, 20, 37}, 40, 20, 3) && check_walk({0}, 5, 3, 2) && check_walk({7, -3, 9, 5, 90}, 30, 9, 1);
  right &= check_walk({0, 700}, 700, 40, 5);  // more row tiles than share weights at a time
  std::vector<int32_t> many{0};
  for (int e = 0; e < 100; ++e) many.push_back(many.back() + e % 3 * 7);
  return right && check_walk(many, many.back() + 11, 10, 4) && check_walk(many, many.back() - 50, 10, 7);
}

// One expert, rows not a multiple of anything: exact for numbers of few bits, and for others that rounding to TF32
// leaves.
template <bool k_major>
bool check_tf32() {
  constexpr int rows = 70, n = 72, k = 40;
  std::mt19937 generator(3);
  std::vector<float> a(rows * k), w(n * k), out(rows * n);
  for (auto* values : {&a, &w})
    for (float& x : *values) x = float(int(generator() % 9) - 4) * 1.0001f;  // 1.0001 is 1 in TF32
  const std::vector<int32_t> offsets{0, rows};
  const GroupedGemmParams p{.a = {.rows = {a.data(), Dtype::float32, k}, .num_rows = rows},
                            .weight = {w.data(), Dtype::float32, n * k, k_major ? k : 1, k_major ? 1 : n},
                            .offsets = offsets.data(),
                            .num_experts = 1,
                            .num_rows = rows,
                            .n = n,
                            .k = k,
                            .out = {out.data(), Dtype::float32, n}};
  const TileGrid grid{
      .offsets = p.offsets, .num_experts = 1, .num_rows = rows, .num_cols = n, .rows = 128, .cols = 128};
  using Shared = GemmShared<RowTiles<float, Tf32Tiles, true>, WeightTiles<float, Tf32Tiles, k_major, true>, Tf32Tiles>;
  launch({.grid = 2, .block = 128, .shared_bytes = sizeof(Shared)},
         grouped_gemm_kernel<float, Tf32Tiles, k_major, true>, p, grid, nullptr);
  bool right = true;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < n; ++c) {
      float sum = 0;
      for (int i = 0; i < k; ++i) sum += std::round(a[r * k + i]) * std::round(k_major ? w[c * k + i] : w[i * n + c]);
      right &= out[r * n + c] == sum;
    }
  return right;
}

}  // namespace

int main() {
  bool right = report("walk", check_walks());
  right &= report("tf32", check_tf32<true>());
  right &= report("tf32 of transposed weights", check_tf32<false>());
  return right ? 0 : 1;
}
