// The fewest rows times weights whose unit stride runs along the reduction, where batch invariance is not asked for:
// dot products of rows that lie contiguous. Memory is read in a few long streams, and nothing is transposed but sums.
// Each lane sums its share of a row, and lanes are folded at the end: not the order of multiply.h, so that a row's bits
// change where its expert has more rows (are_dots).
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/isa/pack.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

// The most rows of A, for weights of type S. Between them lie as many Elements as a tile's block of A has room for.
inline constexpr int kMostDotRows = 6;
template <class S>
inline constexpr int kDotRows = sizeof(S) == 2 ? kMostDotRows : 4;
template <class Ar>
inline constexpr int64_t kDotStride = kTileRows / kMostDotRows * RowsOfA<Ar>::kRowStride;

// The most values of a row in AVX-512, by the number of rows: with more, transposing squares (few_rows.h) is faster,
// unless weights change their width. With more than kDotRows it is faster at any length. Measured.
inline constexpr int64_t kAnyDepth = std::numeric_limits<int64_t>::max();
inline constexpr int64_t kDotDepth[kMostDotRows + 1] = {kAnyDepth, kAnyDepth, kAnyDepth, 8192, 4096, 2048, 2048};
template <class Ar, class S>
bool are_dots(int64_t rows, int64_t depth) {
  constexpr bool any_depth = MOE_VECTOR_BYTES < 64 || sizeof(S) * Ar::kDepth != sizeof(typename Ar::Element);
  return rows <= kDotRows<S> && (any_depth || depth <= kDotDepth[rows]);
}

// Runs of weight rows that are read side by side: four where a step is short enough for the processor to look ahead by
// itself, else two, asked for kDotBytesAhead ahead, into L1.
constexpr bool looks_ahead(int rows) { return rows <= 2; }
inline constexpr int kDotBytesAhead = 3 << 10;

// The sum of v[i]'s lanes becomes lane i: pairs of neighbours first, within 16 bytes, then between them. v is
// overwritten.
template <class C, int count = kLanes<C>>
MOE_INLINE Vec<C> fold_lanes(Vec<C>* v) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    constexpr bool within = kLanes<C> / count < 16 / int(sizeof(C));
#pragma GCC unroll 16
    for (int i = 0; i < count; i += 2) {
      unzip<C, within>(v[i], v[i + 1], std::make_integer_sequence<int, kLanes<C>>());
      v[i / 2] = v[i] + v[i + 1];
    }
    return fold_lanes<C, count / 2>(v);
  }
}

// sums[row * lanes + s * unit] = a[row, depth] . weight[s * run, depth], lane by lane, for each stream s. A block's sum
// starts from zero, as in multiply.h: kBlockSteps steps of each lane.
template <class Ar, class X, int rows, int streams, int unit, class S>
MOE_INLINE void dot_lanes(const typename Ar::Element* a, const S* weight, int64_t run, int64_t depth,
                          Vec<typename Ar::C>* sums) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  constexpr int64_t kStep = kLanes<C> * Ar::kDepth, kBlock = kBlockSteps * kStep, kAhead = kDotBytesAhead / sizeof(S);
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlock) {
    const int64_t end = min(begin + kBlock, depth);
    Vec<C> acc[rows][streams] = {};
    const auto add = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      Vec<Element> values[streams];
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) values[s] = Reader<Ar, X, S>::along_k(weight + s * run + k, n, 1, false);
#pragma GCC unroll 8
      for (int row = 0; row < rows; ++row) {
        const auto x = load_vector<Element>(a + row * kDotStride<Ar> + k / Ar::kDepth);
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) acc[row][s] = Ar::step(acc[row][s], x, values[s]);
      }
    };
    int64_t k = begin;
    for (; k + kStep <= end; k += kStep) {
      if constexpr (streams > 1 && !looks_ahead(rows))
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) fetch_ahead<1>(weight + s * run + k + kAhead, kStep);
      add(k, kStep);
    }
    if (k < end) add(k, end - k);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) {
        Vec<C>& sum = sums[row * kLanes<C> + s * unit];
        sum = begin == 0 ? acc[row][s] : sum + acc[row][s];
      }
  }
}

// c[rows, cols] (+)= a[rows, depth] . weights[cols, depth]^T, kLanes columns at a time, the next unit of each run;
// those left over one by one.
template <class Ar, class X, int rows, class S>
void dot_columns(const typename Ar::Element* a, const S* weight, int64_t n_stride, int64_t cols, int64_t depth,
                 typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  constexpr int lanes = kLanes<C>, streams = std::min(lanes, looks_ahead(rows) ? 4 : 2), unit = lanes / streams;
  const int64_t run = cols / lanes * unit, rest = run * streams;  // columns of a run; the first left over
  for (int64_t col = 0; col < run; col += unit) {
    Vec<C> sums[rows * lanes];
    for (int i = 0; i < unit; ++i)
      dot_lanes<Ar, X, rows, streams, unit>(a, weight + (col + i) * n_stride, run * n_stride, depth, sums + i);
    for (int row = 0; row < rows; ++row) {
      C folded[lanes];
      store_vector(folded, fold_lanes<C>(sums + row * lanes));
      for (int s = 0; s < streams; ++s)
        for (int i = 0; i < unit; ++i) {
          C& to = c[row * kTileCols + s * run + col + i];
          to = (first ? C(0) : to) + folded[s * unit + i];
        }
    }
  }
  if (rest == cols) return;
  Vec<C> sums[rows * lanes] = {};  // lanes without a column stay zero
  for (int64_t col = rest; col < cols; ++col)
    dot_lanes<Ar, X, rows, 1, 1>(a, weight + col * n_stride, 0, depth, sums + (col - rest));
  for (int row = 0; row < rows; ++row)
    join_sum<C>(c + row * kTileCols + rest, fold_lanes<C>(sums + row * lanes), first);
}

// The same for n rows, at most kDotRows<S>.
template <class Ar, class X, int rows = 1, class S>
void multiply_few_dots(int64_t n, const typename Ar::Element* a, const S* weight, int64_t n_stride, int64_t cols,
                       int64_t depth, typename Ar::C* c, bool first) {
  if constexpr (rows < kDotRows<S>) {
    if (n > rows) return multiply_few_dots<Ar, X, rows + 1>(n, a, weight, n_stride, cols, depth, c, first);
  }
  dot_columns<Ar, X, rows>(a, weight, n_stride, cols, depth, c, first);
}

}  // namespace moe::MOE_ISA
