// What the producers of a ragged-M GEMM bring to shared memory on sm_90a: weights by TMA, the rows of A by TMA where
// they lie one after another, by cp.async where they are gathered. What lies beyond the reduction's end becomes zeros
// on both sides (0 * NaN is NaN); rows and columns beyond the tile may hold anything, and are never stored.
#pragma once

#include <type_traits>

#include "cuda/arch/tma.cuh"
#include "cuda/kernels/gemm_operands.cuh"
#include "cuda/kernels/gemm_tiles_sm90.h"
#include "cuda/kernels/panels.cuh"

namespace moe {

struct HopperGemmLaunch {
  GroupedGemmParams p;
  TileGrid grid;
  float* parts;                  // of the score gradient, [num_rows, tiles of columns], or null
  bool rows_by_tma;              // not gathered
  arch::TensorMap row_boxes;     // of A, [rows, 64], where by TMA
  arch::TensorMap weight_boxes;  // [cols / 2, 64 of k] or [64 of k, 64 columns]
};

// A step of the weights that a tile multiplies: rows along K, or along N as they lie.
template <class T, class Config, bool k_major>
using WeightStep = std::conditional_t<k_major, Panels<T, 64, Config::value.cols>, Panels<T, Config::value.cols, 64>>;

// Two runs of columns, see WeightColumns.
template <class T, int rows>
MOE_INLINE void load_weights(Panels<T, 64, rows>& to, const HopperGemmLaunch& at, arch::Barrier& landed,
                             const WeightColumns& columns, int k, int expert) {
  arch::tma_load(to.values[0], at.weight_boxes, landed, k, int(columns.first), expert);
  arch::tma_load(to.values[0][rows / 2], at.weight_boxes, landed, k, int(columns.second), expert);
}

template <class T, int cols>
MOE_INLINE void load_weights(Panels<T, cols, 64>& to, const HopperGemmLaunch& at, arch::Barrier& landed,
                             const WeightColumns& columns, int k, int expert) {
#pragma unroll
  for (int col = 0; col < cols; col += 64) {
    const int64_t from = col < cols / 2 ? columns.first + col : columns.second + col - cols / 2;
    arch::tma_load(to.values[col / 64], at.weight_boxes, landed, int(from), k, expert);
  }
}

// Gathered rows: a thread of 128 copies a chunk of every 16th row.
template <class T, int rows>
class GatheredRowLoader {
 public:
  using Shared = Panels<T, 64, rows>;

  MOE_INLINE GatheredRowLoader(const GatheredRows& from, int64_t depth) : from_(from), depth_(int(depth)) {}

  // Asks for the slots of a tile's rows, long before they are used: one by each thread, of those that eight share.
  MOE_INLINE void find(const Tile& tile) {
    const int own = row(chunk());
    slot_ = own < tile.rows ? from_.row_slot[tile.row_begin + own] : 0;
  }

  // Turns to the tile whose slots were asked for last.
  MOE_INLINE void begin(int tile_rows) {
    tile_rows_ = tile_rows;
    const uint32_t own = uint32_t(slot_within(from_, slot_)) / uint32_t(from_.width);  // slots are below 2^31
#pragma unroll
    for (int i = 0; i < kCount; ++i) rows_[i] = arch::shuffle(own, arch::lane_id() / 8 * 8 + i);
  }

  MOE_INLINE void load(Shared& to, int k) const {
    const int left = max(min(depth_ - k - chunk() * Shared::kChunk, Shared::kChunk), 0);
    const char* const first =
        static_cast<const char*>(from_.rows.data) + (left > 0 ? k + chunk() * Shared::kChunk : 0) * 2;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      arch::copy_async_16(to.at(0, row(i), chunk()), first + uint64_t(rows_[i]) * uint32_t(2 * from_.rows.stride),
                          row(i) < tile_rows_ ? 2 * left : 0);
  }

 private:
  static constexpr int kCount = rows / 16;
  static_assert(kCount <= 8);
  static MOE_INLINE int chunk() { return int(threadIdx.x) % 8; }
  static MOE_INLINE int row(int i) { return int(threadIdx.x) / 8 + 16 * i; }

  const GatheredRows& from_;
  int depth_, tile_rows_ = 0;
  int32_t slot_ = 0;
  uint32_t rows_[kCount];
};

}  // namespace moe
