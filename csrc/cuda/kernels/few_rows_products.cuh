// A few rows of one expert times some columns of its weights, a warp's part of the reduction at a time. Weights go from
// global memory to registers, 16 bytes a lane, and are multiplied there: the lanes' values stand in the order that the
// reduction is taken in, the same for rows and weights, so that none has to move to another lane.
//
// Both classes below: kCols columns, kDepth values of the reduction in a Step; load(k) asks for the step that begins at
// k, add(step) multiplies it, put(to) stores what the warp has summed up.
#pragma once

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/gemm_operands.cuh"

namespace moe {

// Rows of one expert, at most.
template <class T>
inline constexpr int kFewRows = sizeof(T) == 2 ? 16 : 8;

// Where the rows of a tile lie, and what they are scaled by.
template <class T>
struct FewRowsOperand {
  const T* rows[kFewRows<T>];
  float scales[kFewRows<T>];
};

// By the threads of a block together; rows behind the last repeat it, and are never stored.
template <class T>
MOE_INLINE void find_rows(const GroupedGemmParams& p, const Tile& tile, FewRowsOperand<T>& to) {
  const int row = int(threadIdx.x);
  if (row >= kFewRows<T>) return;
  const int64_t slot = slot_of(p.a, tile.row_begin + min(row, tile.rows - 1));
  to.rows[row] = row_at<T>(p.a, slot);
  to.scales[row] = scale_at(p.a, slot);
}

// 16 bytes of values, as the tensor cores read them.
using Chunk = arch::Pack<uint32_t, 4>;

// The first n values at `from` of a chunk of T, then zeros; weights are read once and need not stay in L1.
template <class T, class S>
MOE_INLINE Chunk few_rows_weights(const S* from, int64_t n, const Source& source) {
  constexpr int size = 16 / sizeof(T);
  if constexpr (std::is_same_v<T, S>)
    if (source.aligned && n >= size) return arch::load_streamed<Chunk>(from);
  return bits_as<Chunk>(read_chunk<T>(from, int(max(min(n, int64_t(size)), int64_t(0))), source, 1));
}

template <class T>
MOE_INLINE Chunk few_rows_values(const T* from, int64_t n, const Source& source, float scale) {
  constexpr int size = 16 / sizeof(T);
  if (source.aligned && !source.scaled && n >= size) return arch::load<Chunk>(from);
  return bits_as<Chunk>(read_chunk<T>(from, int(max(min(n, int64_t(size)), int64_t(0))), source, scale));
}

// A lane is (group, quarter): group says which columns and which row, quarter which eighth values of 32.
struct FewRowsLane {
  int group = arch::lane_id() / 4, quarter = arch::lane_id() % 4;
};

// Where a lane's weights begin: with unit stride along K four columns, otherwise one run of columns, `count` of which
// are there.
template <bool along_k, int cols>
struct FewRowsColumns {
  static constexpr int kRuns = along_k ? 4 : 1, kWidth = cols / 8;
  int64_t offsets[kRuns];
  int count;

  MOE_INLINE FewRowsColumns(const GroupedGemmParams& p, const Tile& tile) {
    const WeightColumns columns = weight_columns(p, tile, cols);
    const int group = FewRowsLane{}.group;
    if constexpr (along_k) {
#pragma unroll
      for (int i = 0; i < kRuns; ++i) offsets[i] = columns.template at<cols>(group + 8 * i) * p.weight.n_stride;
      count = cols;
    } else {
      const int within = group * kWidth % (cols / 2);
      const bool second = group * kWidth >= cols / 2;
      offsets[0] = (second ? columns.second : columns.first) + within;
      count = max(min((second ? columns.second_count : columns.first_count) - within, kWidth), 0);
    }
  }
};

// Two-byte values on tensor cores: the weights' columns are the 16 rows of a fragment, the rows its 8 columns.
template <class T, class W, bool along_k>
class TensorCoreFewRows {
 public:
  static constexpr int kCols = along_k ? 32 : 64, kDepth = along_k ? 64 : 32;
  struct Step {
    Chunk weights[8], rows[kDepth / 32][2];
  };

  MOE_INLINE TensorCoreFewRows(const GroupedGemmParams& p, const Tile& tile, const FewRowsOperand<T>& rows)
      : row_source_{p.a.rows.data, p.a.rows.dtype, rows_are_aligned(p.a), p.a.scale.data != nullptr},
        weight_source_(weights_of_expert(p, tile.expert)),
        columns_(p, tile),
        rows_(rows),
        k_stride_(p.weight.k_stride),
        end_(p.k),
        two_(tile.rows > 8) {}

  MOE_INLINE Step load(int64_t k) const {
    Step step;
    const auto* weights = static_cast<const W*>(weight_source_.data);
    k += 8 * lane_.quarter;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (along_k) {
        const int64_t at = k + i / 4 * 32;
        step.weights[i] = few_rows_weights<T>(weights + columns_.offsets[i % 4] + at, end_ - at, weight_source_);
      } else {
        const int64_t at = k + i, n = at < end_ ? columns_.count : 0;
        step.weights[i] = few_rows_weights<T>(weights + columns_.offsets[0] + at * k_stride_, n, weight_source_);
      }
    }
#pragma unroll
    for (int i = 0; i < kDepth / 32; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        step.rows[i][half] = {};
        if (half == 1 && !two_) continue;
        const int row = row_of(lane_.group) + 8 * half;
        step.rows[i][half] =
            few_rows_values(rows_.rows[row] + k + 32 * i, end_ - k - 32 * i, row_source_, rows_.scales[row]);
      }
    return step;
  }

  MOE_INLINE void add(const Step& step) {
#pragma unroll
    for (int i = 0; i < kDepth / 32; ++i)
#pragma unroll
      for (int part = 0; part < 2; ++part)  // 16 of the 32 values
#pragma unroll
        for (int m = 0; m < kCols / 16; ++m) {
          uint32_t weights[4];
          fragment(step.weights + 4 * i, part, m, weights);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (half == 1 && !two_) continue;
            const uint32_t rows[2] = {step.rows[i][half][2 * part], step.rows[i][half][2 * part + 1]};
            arch::mma_16x8x16<T>(sums_[m][half], weights, rows);
          }
        }
  }

  MOE_INLINE void put(Products<kFewRows<T>, kCols>& to) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < kCols / 16; ++m) {
        const int row = row_of(2 * lane_.quarter + i % 2) + 8 * (i / 2);
        const float first = sums_[m][i / 2][i % 2], second = sums_[m][i / 2][2 + i % 2];
        if constexpr (along_k) {
          *to.at(row, 16 * m + lane_.group) = first;
          *to.at(row, 16 * m + lane_.group + 8) = second;
        } else {
          arch::store(to.at(row, 8 * lane_.group + 2 * m), float2{first, second});
        }
      }
  }

 private:
  // The row that stands in a fragment's column: even columns 0 to 3, odd ones 4 to 7, so that the four rows that the
  // lanes store at once follow each other, and lie in different banks.
  static MOE_INLINE int row_of(int column) { return column / 2 + column % 2 * 4; }

  // 16 columns by 16 values of the reduction. Along K a lane has eight values of a column; otherwise eight columns of a
  // value, which are put side by side here.
  static MOE_INLINE void fragment(const Chunk* weights, int part, int m, uint32_t (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int other = i % 2, pair = i / 2;
      if constexpr (along_k) {
        out[i] = weights[2 * m + other][2 * part + pair];
      } else {
        const uint32_t first = weights[4 * part + 2 * pair][m], second = weights[4 * part + 2 * pair + 1][m];
        out[i] = other ? first >> 16 | (second & 0xffff0000) : (first & 0xffff) | second << 16;
      }
    }
  }

  Source row_source_, weight_source_;
  FewRowsColumns<along_k, kCols> columns_;
  const FewRowsOperand<T>& rows_;
  int64_t k_stride_, end_;
  bool two_;  // more than eight rows
  FewRowsLane lane_;
  float sums_[kCols / 16][2][4] = {};
};

// float32, in float32: a lane has four columns and four values of the reduction.
template <bool along_k>
class FloatFewRows {
 public:
  static constexpr int kCols = 32, kDepth = 16;
  struct Step {
    Quad weights[4];
    int64_t k;
  };

  MOE_INLINE FloatFewRows(const GroupedGemmParams& p, const Tile& tile, const FewRowsOperand<float>& rows)
      : row_source_{p.a.rows.data, Dtype::float32, rows_are_aligned(p.a), p.a.scale.data != nullptr},
        weight_source_(weights_of_expert(p, tile.expert)),
        columns_(p, tile),
        rows_(rows),
        k_stride_(p.weight.k_stride),
        end_(p.k),
        count_(tile.rows) {}

  MOE_INLINE Step load(int64_t k) const {
    Step step;
    const auto* weights = static_cast<const float*>(weight_source_.data);
    step.k = k + 4 * lane_.quarter;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (along_k) {
        const float* from = weights + columns_.offsets[i] + step.k;
        step.weights[i] = bits_as<Quad>(few_rows_weights<float>(from, end_ - step.k, weight_source_));
      } else {
        const float* from = weights + columns_.offsets[0] + (step.k + i) * k_stride_;
        const int64_t n = step.k + i < end_ ? columns_.count : 0;
        step.weights[i] = bits_as<Quad>(few_rows_weights<float>(from, n, weight_source_));
      }
    }
    return step;
  }

  MOE_INLINE void add(const Step& step) {
#pragma unroll
    for (int row = 0; row < kFewRows<float>; ++row) {
      if (row >= count_) break;
      const auto values =
          bits_as<Quad>(few_rows_values(rows_.rows[row] + step.k, end_ - step.k, row_source_, rows_.scales[row]));
#pragma unroll
      for (int col = 0; col < 4; ++col)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          sums_[row][col] += values[k] * (along_k ? step.weights[col][k] : step.weights[k][col]);
    }
  }

  MOE_INLINE void put(Products<kFewRows<float>, kCols>& to) const {
#pragma unroll
    for (int row = 0; row < kFewRows<float>; ++row)
#pragma unroll
      for (int col = 0; col < 4; ++col) {
        float sum = sums_[row][col];
        sum += arch::shuffle_xor(sum, 1);
        sum += arch::shuffle_xor(sum, 2);
        if (lane_.quarter == col) *to.at(row, along_k ? lane_.group + 8 * col : 4 * lane_.group + col) = sum;
      }
  }

 private:
  Source row_source_, weight_source_;
  FewRowsColumns<along_k, kCols> columns_;
  const FewRowsOperand<float>& rows_;
  int64_t k_stride_, end_;
  int count_;
  FewRowsLane lane_;
  float sums_[kFewRows<float>][4] = {};
};

}  // namespace moe
