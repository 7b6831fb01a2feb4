// Few rows: bound by reading the weights, which are read once, where they lie. A square of them is transposed in
// registers and multiplied there, never packed. Sums run in the order and in the blocks of multiply.h, so that a row's
// result does not depend on which of the two computed it.
#pragma once

#include "cpu/isa/pack.h"

namespace moe::MOE_ISA {

// The most rows that are few: their accumulators and a block share the registers. Between rows of A lie as many
// Elements as a tile's block of A has room for, whole blocks of the reduction, so that every address is a register plus
// a constant.
inline constexpr int kFewRows = kMicroRows;
template <class Ar>
inline constexpr int64_t kFewRowsStride = kTileRows / kFewRows * RowsOfA<Ar>::kRowStride / kBlockSteps * kBlockSteps;

// acc[rows] += a[rows, kLanes Elements] . block of weights. next: the same place in the weights that will be read after
// these, or null.
template <class Ar, class X, bool whole, int rows, class S>
MOE_INLINE void few_rows_block(const typename Ar::Element* a, const S* corner, int64_t n_stride, int64_t width,
                               int64_t depth, Vec<typename Ar::C>* acc, const S* next) {
  constexpr int lanes = kLanes<typename Ar::C>;
  Vec<typename Ar::Element> block[lanes];
  load_transposed<Ar, X, whole>(corner, n_stride, width, depth, block);
  if (next)
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) __builtin_prefetch(next + j * n_stride, 0, 2);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row)
      acc[row] = Ar::step(acc[row], broadcast(a[row * kFewRowsStride<Ar> + i]), block[i]);
}

// c[rows, kLanes] (+)= a[rows, depth] . weights[kLanes, depth]^T, of which `width` columns are there.
template <class Ar, class X, class S, int rows>
MOE_INLINE void few_rows_columns(const typename Ar::Element* a, const S* weight, int64_t n_stride, int64_t width,
                                 int64_t depth, typename Ar::C* c, bool first, const S* next) {
  using C = typename Ar::C;
  constexpr int64_t step = kLanes<C> * Ar::kDepth;
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlockDepth<Ar>) {
    const int64_t end = min(begin + kBlockDepth<Ar>, depth);
    Vec<C> acc[rows] = {};
    int64_t k = begin;
    for (; width >= kLanes<C> && k + step <= end; k += step)
      few_rows_block<Ar, X, true, rows>(a + k / Ar::kDepth, weight + k, n_stride, width, end - k, acc,
                                        next ? next + k : nullptr);
    for (; k < end; k += step)
      few_rows_block<Ar, X, false, rows, S>(a + k / Ar::kDepth, weight + k, n_stride, width, end - k, acc, nullptr);
    for (int row = 0; row < rows; ++row) {
      C* to = c + row * kTileCols;
      store<C>(to, first && begin == 0 ? acc[row] : load<C>(to) + acc[row]);
    }
  }
}

// The rows that are computed for `count` of them: a power of two, or all.
inline int64_t rows_taken(int64_t count) {
  int64_t rows = 1;
  while (rows < count) rows = rows < kFewRows / 2 ? 2 * rows : kFewRows;
  return rows;
}

template <class Ar, class X, class S, int rows = 1>
void multiply_few(int64_t n, const typename Ar::Element* a, const S* weight, int64_t n_stride, int64_t cols,
                  int64_t depth, typename Ar::C* c, bool first) {
  constexpr int lanes = kLanes<typename Ar::C>, more = rows < kFewRows / 2 ? 2 * rows : kFewRows;
  if constexpr (rows < kFewRows) {
    if (n > rows) return multiply_few<Ar, X, S, more>(n, a, weight, n_stride, cols, depth, c, first);
  }
  for (int64_t col = 0; col < cols; col += lanes) {
    const S* here = weight + col * n_stride;
    few_rows_columns<Ar, X, S, rows>(a, here, n_stride, cols - col, depth, c + col, first,
                                     col + lanes < cols ? here + lanes * n_stride : nullptr);
  }
}

}  // namespace moe::MOE_ISA
