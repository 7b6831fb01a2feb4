// An operand [rows, cols] of a product along its rows, as wgmma reads it across K: panels of 64 columns, each of
// `depth` rows of 128 bytes, swizzled as TMA swizzles. What TMA cannot bring is copied here, row by row.
#pragma once

#include "cuda/arch/copy_async.cuh"
#include "cuda/arch/warp.cuh"
#include "cuda/kernels/gathered_rows.cuh"
#include "cuda/kernels/offsets.cuh"
#include "cuda/kernels/values.cuh"

namespace moe {

template <class T, int cols, int depth>
struct Panels {
  static constexpr int kCols = 64, kCount = cols / kCols, kChunk = 8;  // of one panel; panels; elements of 16 bytes
  static constexpr int kBytes = kCols * depth * int(sizeof(T));        // of one panel

  alignas(1024) T values[kCount][depth][kCols];

  MOE_INLINE T* at(int panel, int row, int chunk) { return values[panel][row] + (chunk ^ row % 8) * kChunk; }
};

// Rows that are gathered, scaled, or fewer than a step takes: what is not there becomes zeros, as 0 * NaN is NaN.
// Columns come in whole chunks; a thread of 128 copies one of every 16th row in every panel.
template <class T, int cols, int depth>
class PanelLoader {
 public:
  using Shared = Panels<T, cols, depth>;

  MOE_INLINE PanelLoader(const GatheredRows& from, int64_t num_cols) : from_(from), num_cols_(num_cols) {}

  // Asks for the slots of the first step.
  MOE_INLINE void begin(const RowRange& rows, int64_t col) {
    end_ = rows.end, col_ = col + chunk() * Shared::kChunk;
    find(rows.begin);
  }

  // The step that begins at `row`; the slots of the next are asked for first, long before they are used.
  MOE_INLINE void load(Shared& to, int64_t row) {
    const int64_t slot = from_.row_slot ? slot_within(from_, slot_) : row + own_row();
    const float own_scale = from_.scale.data && row + own_row() < end_ ? read(from_.scale, slot) : 0;
    const uint32_t own = from_.row_slot ? uint32_t(slot) / uint32_t(from_.width) : uint32_t(slot);  // below 2^31
    find(row + depth);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool there = row + row_of(i) < end_;
      const int lane = arch::lane_id() / 8 * 8 + i;
      const uint32_t source_row = arch::shuffle(own, lane);
      const float scale = from_.scale.data ? arch::shuffle(own_scale, lane) : 1;
      const T* const source = static_cast<const T*>(from_.rows.data) + int64_t(source_row) * from_.rows.stride + col_;
#pragma unroll
      for (int panel = 0; panel < Shared::kCount; ++panel)
        copy(to.at(panel, row_of(i), chunk()), source + panel * Shared::kCols,
             there && col_ + panel * Shared::kCols < num_cols_, scale);
    }
  }

 private:
  static constexpr int kRows = depth / 16;
  static_assert(kRows <= 8);
  static MOE_INLINE int chunk() { return int(threadIdx.x) % 8; }
  static MOE_INLINE int row_of(int i) { return int(threadIdx.x) / 8 + 16 * i; }
  static MOE_INLINE int own_row() { return row_of(chunk() % kRows); }

  // One slot by each thread, of those that eight share.
  MOE_INLINE void find(int64_t row) {
    if (!from_.row_slot) return;
    const int64_t own = row + own_row();
    slot_ = own < end_ ? from_.row_slot[own] : 0;
  }

  // A scale is applied in registers: nothing can be done to a value between TMA or cp.async and wgmma.
  MOE_INLINE void copy(T* to, const T* from, bool there, float scale) const {
    if (!from_.scale.data) {
      arch::copy_async_16(to, there ? from : from_.rows.data, there ? 16 : 0);
    } else {
      arch::Pack<T, Shared::kChunk> values{};
      if (there) values = arch::load<arch::Pack<T, Shared::kChunk>>(from);
#pragma unroll
      for (int v = 0; v < Shared::kChunk; ++v) values[v] = from_float<T>(to_float(values[v]) * scale);
      arch::store(to, values);
    }
  }

  const GatheredRows& from_;
  int64_t num_cols_, end_ = 0, col_ = 0;
  int32_t slot_ = 0;
};

}  // namespace moe
