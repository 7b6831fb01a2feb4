// The grouped GEMMs on the CPU: the problem is cut into tiles by its shape and the rows of each expert, and the tiles
// run on torch's threads.
#include <cstring>
#include <vector>

#include "cpu/device.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace moe {

namespace {

// offsets as every device reads them: from 0, within 0..rows, never falling.
std::vector<int64_t> read_offsets(const int32_t* offsets, int64_t num_experts, int64_t rows) {
  std::vector<int64_t> out(num_experts + 1, 0);
  for (int64_t e = 0; e < num_experts; ++e)
    out[e + 1] = std::max(out[e], std::min<int64_t>(std::max<int64_t>(offsets[e + 1], 0), rows));
  return out;
}

void zero_rows(const Matrix& matrix, int64_t begin, int64_t end, int64_t cols) {
  if (!matrix) return;
  const int64_t size = size_of(matrix.dtype);
  for_each_range(end - begin, cols, [&](int64_t from, int64_t to) {
    for (int64_t row = begin + from; row < begin + to; ++row)
      std::memset(static_cast<char*>(matrix.data) + row * matrix.stride * size, 0, cols * size);
  });
}

// Inner columns of a tile: its halves hold their gates and their ups. Whole panels of prepacked weights are multiplied,
// and where ups begin within a panel, what stands before them takes room in their half.
int64_t gated_tile_cols(const GroupedGemmParams& p) {
  const bool whole = p.activation.interleaved || p.n / 2 % panel_columns(p.weight.dtype) == 0;
  return p.weight.prepacked && !whole ? kTileCols / 2 - panel_columns(Dtype::float32) : kTileCols / 2;
}

// The share of each tile of columns, summed in order; zero for slots that have no row.
template <class C>
void reduce_score(const GroupedGemmParams& p, const C* partial, int64_t col_tiles, int64_t rows) {
  C* out = static_cast<C*>(p.grad_score);
  const int64_t slots = p.a.num_rows * p.a.width;
  std::fill(out, out + slots, C(0));
  for (int64_t row = 0; row < rows; ++row) {
    C sum = 0;
    for (int64_t tile = 0; tile < col_tiles; ++tile) sum += partial[row * col_tiles + tile];
    const int64_t slot = p.a.row_slot[row];
    if (slot >= 0 && slot < slots) out[slot] = sum;
  }
}

}  // namespace

void grouped_gemm(const GroupedGemmParams& p, const Device&) {
  const Kernels& isa = kernels();
  const bool gated = p.activation.gated;
  const int64_t cols = p.epilogue == Epilogue::activate && gated ? p.n / 2 : p.n;
  const int64_t tile_cols = p.epilogue == Epilogue::activate && gated ? gated_tile_cols(p) : kTileCols;
  // Without columns one tile remains for the bias's share of the score gradient.
  const int64_t col_tiles = std::max(ceil_div(cols, tile_cols), int64_t(p.grad_score ? 1 : 0));

  const auto offsets = read_offsets(p.offsets, p.num_experts, p.num_rows);
  const int64_t end = offsets.back();
  zero_rows(p.out, end, p.num_rows, cols);
  if (p.epilogue == Epilogue::activate) zero_rows(p.pre, end, p.num_rows, p.n);
  if (p.epilogue == Epilogue::activate_backward) zero_rows(p.grad_pre, end, p.num_rows, gated ? 2 * p.n : p.n);

  // Experts' rows in blocks of about equal size; the blocks that share a tile of weights stand together.
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < p.num_experts; ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e], blocks = ceil_div(rows, kTileRows);
    for (int64_t col = 0; col < col_tiles * tile_cols; col += tile_cols)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = rows * block / blocks, next = rows * (block + 1) / blocks;
        tiles.push_back({.expert = e,
                         .row_begin = offsets[e] + begin,
                         .rows = next - begin,
                         .col_begin = col,
                         .cols = std::min(tile_cols, cols - col)});
      }
  }

  const bool is_double = p.a.rows.dtype == Dtype::float64;
  std::vector<double> partial;  // [rows, col_tiles]
  if (p.grad_score) partial.resize(end * col_tiles);
  const int64_t count = int64_t(tiles.size());
  const double cost = count ? double(end) * p.n * p.k / double(count) + double(p.k) * kTileCols : 0;
  for_each_piece(count, cost, [&](int64_t i) { isa.grouped_gemm(p, tiles[i], partial.data(), col_tiles); });
  if (p.grad_score) {
    if (is_double) reduce_score(p, partial.data(), col_tiles, end);
    else reduce_score(p, reinterpret_cast<const float*>(partial.data()), col_tiles, end);
  }
}

void grouped_gemm_weight_grad(const WeightGradParams& p, const Device&) {
  const Kernels& isa = kernels();
  const auto offsets = read_offsets(p.offsets, p.num_experts, p.num_rows);
  const int64_t n_tiles = ceil_div(p.n, kTileRows), k_tiles = ceil_div(p.k, kTileCols),
                strips = p.num_experts * n_tiles;
  // A piece is a strip of rows, so that a thread has the pages of a fresh output to itself; a strip is cut into runs of
  // tiles only where there are too few to keep the threads busy.
  constexpr int64_t kPiecesOfAThread = 4;
  const int64_t wanted = kPiecesOfAThread * int64_t(torch::stable::get_num_threads());
  const int64_t runs = strips ? std::min(ceil_div(wanted, strips), k_tiles) : 0;
  const double cost = double(std::min<int64_t>(p.n, kTileRows)) * p.k / std::max<int64_t>(runs, 1) *
                      (1 + double(offsets.back()) / std::max<int64_t>(p.num_experts, 1));
  for_each_piece(strips * runs, cost, [&](int64_t i) {
    const int64_t strip = i / runs, run = i % runs, e = strip / n_tiles, n_begin = strip % n_tiles * kTileRows;
    isa.grouped_gemm_weight_grad(p, e, offsets[e], offsets[e + 1], n_begin, k_tiles * run / runs * kTileCols,
                                 std::min(k_tiles * (run + 1) / runs * kTileCols, p.k));
  });
}

void grouped_gemm_bias_grad(const BiasGradParams& p, const Device&) {
  constexpr int64_t kCols = 64;
  const Kernels& isa = kernels();
  const auto offsets = read_offsets(p.offsets, p.num_experts, p.num_rows);
  const int64_t tiles = ceil_div(p.n, kCols);
  const double cost = double(kCols) * (1 + double(offsets.back()) / std::max<int64_t>(p.num_experts, 1));
  for_each_piece(p.num_experts * tiles, cost, [&](int64_t i) {
    const int64_t e = i / tiles, col = i % tiles * kCols;
    isa.grouped_gemm_bias_grad(p, e, offsets[e], offsets[e + 1], col, std::min(col + kCols, p.n));
  });
}

}  // namespace moe
