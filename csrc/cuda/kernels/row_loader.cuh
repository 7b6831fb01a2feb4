// Rows on their way to shared memory for a product along them: both operands lie row by row, as in memory, and what is
// not there is zeros.
#pragma once

#include "cuda/arch/copy_async.cuh"
#include "cuda/kernels/gathered_rows.cuh"
#include "cuda/kernels/offsets.cuh"
#include "cuda/kernels/shared_tile.cuh"
#include "cuda/kernels/values.cuh"

namespace moe {

inline constexpr int kGradCols = 128;  // columns of either operand that a block multiplies

template <class T>
inline constexpr int kGradDepth = sizeof(T) == 2 ? 32 : 16;  // rows of one step

template <class T>
using GradTile = SharedTile<T, kGradDepth<T>, kGradCols>;  // rows of one step, columns of one operand

// One operand: a thread of a block copies one chunk of every kRowStep-th row of a step.
template <class T, int threads>
class RowLoader {
 public:
  __device__ RowLoader(const GatheredRows& from, RowRange rows, int64_t col_begin, int64_t cols, bool aligned)
      : from_(from),
        row_(rows.begin + int(threadIdx.x) / kChunks),
        end_(rows.end),
        col_(col_begin + int(threadIdx.x) % kChunks * kVector),
        left_(cols - col_),
        aligned_(aligned) {
    find();
  }

  // Begins to copy the next step; the slots of the one after it are asked for in time.
  __device__ __forceinline__ void load(GradTile<T>& to) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const bool there = row_ + i * kRowStep < end_ && left_ > 0;
      const T* const row = there ? row_at<T>(from_, slot_within(from_, slots_[i])) + col_ : nullptr;
      T* const chunk = chunk_of(to, i);
      if (aligned_) {
        const int values = there ? int(min(left_, int64_t(kVector))) : 0;
        arch::copy_async_16(chunk, there ? row : from_.rows.data, values * int(sizeof(T)));
      } else {
        arch::store(chunk, load_values<T, kVector>(row, there ? left_ : 0, false));
      }
    }
    row_ += kGradDepth<T>;
    find();
  }

  // Scales what this thread has copied, where rows have a scale; `row_begin` is the step's first row.
  __device__ __forceinline__ void scale(GradTile<T>& tile, int64_t row_begin) const {
    if (!from_.scale.data) return;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row = row_begin + int(threadIdx.x) / kChunks + i * kRowStep;
      const float scale = row < end_ ? scale_at(from_, slot_of(from_, row)) : 0;
      auto values = arch::load<arch::Pack<T, kVector>>(chunk_of(tile, i));
#pragma unroll
      for (int v = 0; v < kVector; ++v) values[v] = from_float<T>(to_float(values[v]) * scale);
      arch::store(chunk_of(tile, i), values);
    }
  }

 private:
  static constexpr int kVector = GradTile<T>::kChunk, kChunks = GradTile<T>::kRowChunks;
  static constexpr int kRowStep = threads / kChunks, kCopies = kGradDepth<T> / kRowStep;

  __device__ static T* chunk_of(GradTile<T>& tile, int i) {
    return tile.at(int(threadIdx.x) / kChunks + i * kRowStep, int(threadIdx.x) % kChunks);
  }

  // Nothing is made of the slots here: that would wait for them.
  __device__ __forceinline__ void find() {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t row = row_ + i * kRowStep;
      slots_[i] = !from_.row_slot ? int32_t(row) : row < end_ ? from_.row_slot[row] : 0;
    }
  }

  const GatheredRows& from_;
  int64_t row_, end_, col_, left_;
  bool aligned_;
  int32_t slots_[kCopies];
};

}  // namespace moe
