// What the producers of a ragged-M GEMM bring to shared memory on sm_90a: weights by TMA, the rows of A by TMA where
// they lie one after another, by cp.async where they are gathered. What lies beyond the reduction's end becomes zeros
// on both sides (0 * NaN is NaN); rows and columns beyond the tile may hold anything, and are never stored.
#pragma once

#include <type_traits>

#include "cuda/arch/cluster.cuh"
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
  int cluster;                   // blocks that fetch weights for one another, 1 or 2
  arch::TensorMap row_boxes;     // of A, [rows, 64], where by TMA
  arch::TensorMap weight_boxes;  // [cols / 2, 64 of k] or [64 of k, 64 columns]
};

// A step of the weights that a tile multiplies: rows along K, or along N as they lie.
template <class T, class Config, bool k_major>
using WeightStep = std::conditional_t<k_major, Panels<T, 64, Config::value.cols>, Panels<T, Config::value.cols, 64>>;

// Which halves of its weights a block fetches: both, or one for both blocks of its cluster.
enum class WeightHalves { both, first_for_both_blocks, second_for_both_blocks };

MOE_INLINE WeightHalves weight_halves(const HopperGemmLaunch& at, const Tile& tile) {
  const bool is_second = arch::block_in_cluster() == 1;
  if (at.cluster == 1 || !(is_second ? tile.after_like : tile.before_like)) return WeightHalves::both;
  return is_second ? WeightHalves::second_for_both_blocks : WeightHalves::first_for_both_blocks;
}

MOE_INLINE void load_half(WeightHalves halves, int half, void* to, const HopperGemmLaunch& at, arch::Barrier& landed,
                          int x, int y, int expert) {
  if (halves == WeightHalves::both) arch::tma_load(to, at.weight_boxes, landed, x, y, expert);
  else if (int(halves) == 1 + half) arch::tma_load_to(0b11, to, at.weight_boxes, landed, x, y, expert);
}

// Two runs of columns, see WeightColumns: a half each.
template <class T, int rows>
MOE_INLINE void load_weights(Panels<T, 64, rows>& to, const HopperGemmLaunch& at, arch::Barrier& landed,
                             const WeightColumns& columns, WeightHalves halves, int k, int expert) {
  load_half(halves, 0, to.values[0], at, landed, k, int(columns.first), expert);
  load_half(halves, 1, to.values[0][rows / 2], at, landed, k, int(columns.second), expert);
}

template <class T, int cols>
MOE_INLINE void load_weights(Panels<T, cols, 64>& to, const HopperGemmLaunch& at, arch::Barrier& landed,
                             const WeightColumns& columns, WeightHalves halves, int k, int expert) {
#pragma unroll
  for (int col = 0; col < cols; col += 64) {
    const int half = col / (cols / 2);
    const int64_t from = (half == 0 ? columns.first : columns.second) + col - half * (cols / 2);
    load_half(halves, half, to.values[col / 64], at, landed, int(from), k, expert);
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
    T* const place = to.at(0, row(0), chunk());  // rows are swizzled by eights: 16 rows further it is the same
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      arch::copy_async_16(place + 16 * i * Shared::kCols, first + uint64_t(rows_[i]) * uint32_t(2 * from_.rows.stride),
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
