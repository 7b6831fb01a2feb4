// Where the operands of a ragged-M product lie, and how a block brings a step of them, `depth` deep, to shared memory.
// What lies beyond the reduction's end becomes zeros on both sides (0 * NaN is NaN); rows and columns beyond the result
// are read from within it and never stored.
#pragma once

#include "cuda/arch/copy_async.cuh"
#include "cuda/kernels/gathered_rows.cuh"
#include "cuda/kernels/gemm_config.h"
#include "cuda/kernels/shared_tile.cuh"
#include "cuda/kernels/tile_walk.cuh"
#include "cuda/kernels/values.cuh"

namespace moe {

// What a tile multiplies of an expert's weights: two runs of as many columns (gates and ups, or one run cut in two).
struct WeightColumns {
  int64_t first, second;          // where the runs begin
  int first_count, second_count;  // columns there are, at most half a tile

  // Column i of a tile, or one beside it where the tile is wider than the result.
  template <int cols>
  MOE_INLINE int64_t at(int i) const {
    if (i < cols / 2 || second_count == 0) return first + min(i, first_count - 1);
    return second + min(i - cols / 2, second_count - 1);
  }
};

// Whether a gate and an up, two columns of the product, make one of the result.
__host__ __device__ inline bool joins_columns(const GroupedGemmParams& p) {
  return p.epilogue == Epilogue::activate && p.activation.gated;
}

// How a result is cut into tiles, each from [rows, cols] of the product.
inline TileGrid tile_grid(const GroupedGemmParams& p, int rows, int cols) {
  const int joined = joins_columns(p) ? 2 : 1;
  return {.offsets = p.offsets,
          .num_experts = int(p.num_experts),
          .num_rows = p.num_rows,
          .num_cols = p.n / joined,
          .rows = rows,
          .cols = cols / joined};
}

// The weights of result columns tile.col_begin.. .
MOE_INLINE WeightColumns weight_columns(const GroupedGemmParams& p, const Tile& tile, int tile_cols) {
  const bool gated = joins_columns(p);
  if (gated && !p.activation.interleaved) return {tile.col_begin, p.n / 2 + tile.col_begin, tile.cols, tile.cols};
  const int64_t begin = gated ? 2 * tile.col_begin : tile.col_begin;
  const int count = gated ? 2 * tile.cols : tile.cols, half = tile_cols / 2;
  return {begin, begin + half, min(count, half), max(count - half, 0)};
}

// How an operand can be brought over: as it lies, or value by value.
struct Source {
  const void* data;
  Dtype dtype;
  bool aligned;  // chunks begin at multiples of 16 bytes (of both dtypes, where they differ)
  bool scaled;
};

__host__ __device__ inline bool multiples_of_16(const void* data, int64_t size, int64_t stride, int64_t other = 0) {
  return ((uint64_t(reinterpret_cast<uintptr_t>(data)) | uint64_t(stride * size) | uint64_t(other * size)) & 15) == 0;
}

__host__ __device__ inline bool rows_are_aligned(const GatheredRows& a) {
  return multiples_of_16(a.rows.data, a.rows.dtype == Dtype::float32 ? 4 : 2, a.rows.stride);
}

__host__ __device__ inline bool weights_are_aligned(const GroupedGemmParams& p) {
  const ExpertWeights& w = p.weight;
  const int64_t size = w.dtype == Dtype::float32 ? 4 : 2;
  if (w.k_stride == 1) return multiples_of_16(w.data, size, w.expert_stride, w.n_stride);
  const bool two_runs = joins_columns(p) && !p.activation.interleaved;
  return multiples_of_16(w.data, size, w.expert_stride, w.k_stride) &&
         (!two_runs || multiples_of_16(nullptr, size, p.n / 2));
}

// The first n values of a chunk at `from`, then zeros: scaled, rounded to T.
template <class T, class S>
MOE_INLINE arch::Pack<T, 16 / sizeof(T)> read_chunk(const S* from, int n, const Source& source, float scale) {
  constexpr int size = 16 / sizeof(T), part = 16 / sizeof(S);
  arch::Pack<T, size> out;
#pragma unroll
  for (int i = 0; i < size; i += part) {
    const auto values = load_values<S, part>(from + i, n - i, source.aligned);
#pragma unroll
    for (int j = 0; j < part; ++j) {
      const float value = to_float(values[j]);
      out[i + j] = from_float<T>(source.scaled && i + j < n ? value * scale : value);
    }
  }
  return out;
}

// Begins to bring a chunk to shared memory; where none of it is there, `offset` may lie anywhere. direct: the source is
// known to be aligned, unscaled and of type T.
template <class T, bool direct>
MOE_INLINE void load_chunk(T* to, const Source& source, int64_t offset, int n, float scale = 1) {
  if (direct || (source.aligned && !source.scaled && source.dtype == dtype_of<T>)) {
    arch::copy_async_16(to, static_cast<const T*>(source.data) + (n > 0 ? offset : 0), n * int(sizeof(T)));
  } else if (source.dtype == dtype_of<T>) {
    arch::store(to, read_chunk<T>(static_cast<const T*>(source.data) + offset, n, source, scale));
  } else {
    arch::store(to, read_chunk<T>(static_cast<const float*>(source.data) + offset, n, source, scale));
  }
}

// What a tile multiplies of an operand with unit stride along K: [rows, depth] at a time. A thread copies one column of
// chunks, every kStep rows.
template <class T, class Config, int rows, bool direct>
class AlongK {
 public:
  using Shared = SharedTile<T, rows, Config::value.depth>;

  // The step that begins at k of the reduction; `left` values remain from there.
  MOE_INLINE void load(Shared& to, int64_t k, int64_t left) const {
    const int n = int(max(min(left - chunk() * Shared::kChunk, int64_t(Shared::kChunk)), int64_t(0)));
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      load_chunk<T, direct>(to.at(row(i), chunk()), source_, offsets_[i] + k, n, scales_[i]);
  }

 protected:
  static constexpr int kStep = Config::value.threads() / Shared::kRowChunks, kCount = rows / kStep;

  MOE_INLINE explicit AlongK(const Source& source) : source_(source) {}

  static MOE_INLINE int row(int i) { return int(threadIdx.x) / Shared::kRowChunks + i * kStep; }

  // Where row(i) begins.
  MOE_INLINE void place(int i, int64_t offset, float scale) {
    offsets_[i] = offset + chunk() * Shared::kChunk;
    scales_[i] = scale;
  }

 private:
  static MOE_INLINE int chunk() { return int(threadIdx.x) % Shared::kRowChunks; }

  Source source_;
  int64_t offsets_[kCount];
  float scales_[kCount];
};

// The rows of A that a tile multiplies.
template <class T, class Config, bool direct>
class RowTiles : public AlongK<T, Config, Config::value.rows, direct> {
 public:
  MOE_INLINE RowTiles(const GroupedGemmParams& p, const Tile& tile)
      : RowTiles::AlongK({p.a.rows.data, p.a.rows.dtype, rows_are_aligned(p.a), p.a.scale.data != nullptr}) {
#pragma unroll
    for (int i = 0; i < this->kCount; ++i) {
      const int64_t slot = slot_of(p.a, tile.row_begin + min(this->row(i), tile.rows - 1));
      this->place(i, row_at<T>(p.a, slot) - static_cast<const T*>(p.a.rows.data), direct ? 1 : scale_at(p.a, slot));
    }
  }
};

MOE_INLINE Source weights_of_expert(const GroupedGemmParams& p, int expert) {
  const ExpertWeights& w = p.weight;
  const int64_t size = w.dtype == Dtype::float32 ? 4 : 2;
  return {static_cast<const char*>(w.data) + expert * w.expert_stride * size, w.dtype, weights_are_aligned(p), false};
}

// The weights that a tile multiplies.
template <class T, class Config, bool k_major, bool direct>
class WeightTiles : public AlongK<T, Config, Config::value.cols, direct> {
 public:
  MOE_INLINE WeightTiles(const GroupedGemmParams& p, const Tile& tile)
      : WeightTiles::AlongK(weights_of_expert(p, tile.expert)) {
    const WeightColumns columns = weight_columns(p, tile, Config::value.cols);
#pragma unroll
    for (int i = 0; i < this->kCount; ++i)
      this->place(i, columns.template at<Config::value.cols>(this->row(i)) * p.weight.n_stride, 1);
  }
};

// With unit stride along N they come [depth, cols] at a time.
template <class T, class Config, bool direct>
class WeightTiles<T, Config, false, direct> {
  static constexpr GemmConfig config = Config::value;

 public:
  using Shared = SharedTile<T, config.depth, config.cols>;

  MOE_INLINE WeightTiles(const GroupedGemmParams& p, const Tile& tile)
      : source_(weights_of_expert(p, tile.expert)), stride_(p.weight.k_stride) {
    const WeightColumns columns = weight_columns(p, tile, config.cols);
    const int col = chunk() * Shared::kChunk, within = col % (config.cols / 2);
    const bool second = col >= config.cols / 2;
    count_ = max(min((second ? columns.second_count : columns.first_count) - within, Shared::kChunk), 0);
    offset_ = (second ? columns.second : columns.first) + within + row() * stride_;
  }

  MOE_INLINE void load(Shared& to, int64_t k, int64_t left) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      load_chunk<T, direct>(to.at(row() + i * kStep, chunk()), source_, offset_ + (k + i * kStep) * stride_,
                            row() + i * kStep < left ? count_ : 0);
  }

 private:
  static constexpr int kStep = config.threads() / Shared::kRowChunks, kCount = config.depth / kStep;
  static MOE_INLINE int row() { return int(threadIdx.x) / Shared::kRowChunks; }
  static MOE_INLINE int chunk() { return int(threadIdx.x) % Shared::kRowChunks; }

  Source source_;
  int64_t stride_, offset_;
  int count_;
};

}  // namespace moe
