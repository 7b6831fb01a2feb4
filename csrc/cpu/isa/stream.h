// Few rows: bound by reading the weights, which are read once, where they lie. A square of them is transposed in
// registers and multiplied there, never packed. Sums run in the order and in the blocks of multiply.h, so that a row's
// result does not depend on which of the two computed it.
#pragma once

#include "cpu/isa/pack.h"

namespace moe::MOE_ISA {

// c[rows, kLanes] (+)= a[rows, depth] . weights[kLanes, depth]^T, of which `width` columns are there. next: the same
// place in the weights that will be read after these, or null.
template <class Ar, class X, class S, int rows>
MOE_INLINE void stream_columns(const typename Ar::Element* a, int64_t a_stride, const S* weight, int64_t n_stride,
                               int64_t width, int64_t depth, typename Ar::C* c, bool first, const S* next) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  constexpr int lanes = kLanes<C>;
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlockDepth<Ar>) {
    const int64_t end = min(begin + kBlockDepth<Ar>, depth);
    Vec<C> acc[rows] = {};
    for (int64_t k = begin; k < end; k += lanes * Ar::kDepth) {
      Vec<Element> block[lanes];
      load_transposed<Ar, X>(weight + k, n_stride, width, end - k, block);
      if (next)
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) __builtin_prefetch(next + k + j * n_stride, 0, 2);
      const Element* from = a + k / Ar::kDepth;
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
#pragma GCC unroll 16
        for (int row = 0; row < rows; ++row)
          acc[row] = Ar::step(acc[row], broadcast(from[row * a_stride + i]), block[i]);
    }
    for (int row = 0; row < rows; ++row) {
      C* to = c + row * kTileCols;
      store<C>(to, first && begin == 0 ? acc[row] : load<C>(to) + acc[row]);
    }
  }
}

// The most rows that stream: their accumulators and a block share the registers.
inline constexpr int kStreamRows = kMicroRows;

template <class Ar, class X, class S, int rows = 1>
void stream(int64_t n, const typename Ar::Element* a, int64_t a_stride, const S* weight, int64_t n_stride, int64_t cols,
            int64_t depth, typename Ar::C* c, bool first) {
  constexpr int lanes = kLanes<typename Ar::C>, more = rows < kStreamRows / 2 ? 2 * rows : kStreamRows;
  if constexpr (rows < kStreamRows) {
    if (n > rows) return stream<Ar, X, S, more>(n, a, a_stride, weight, n_stride, cols, depth, c, first);
  }
  for (int64_t col = 0; col < cols; col += lanes) {
    const S* here = weight + col * n_stride;
    stream_columns<Ar, X, S, rows>(a, a_stride, here, n_stride, cols - col, depth, c + col, first,
                                   col + lanes < cols ? here + lanes * n_stride : nullptr);
  }
}

}  // namespace moe::MOE_ISA
