// The fewest rows times weights whose unit stride runs along the reduction: dot products of rows that lie contiguous,
// so that memory is read in a few long streams and nothing is transposed but sums. A lane adds its own share of a row
// up and lanes are folded at the end: not the order of multiply.h, so that a row's bits depend on whether its expert
// has so few.
#pragma once

#include "cpu/isa/pack.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

// The most rows of A for weights of type S: more are read faster by transposing squares (few_rows.h).
template <class S>
inline constexpr int kDotRows = sizeof(S) == 2 ? 6 : 4;
template <class Ar>
inline constexpr int64_t kDotStride = kTileRows * RowsOfA<Ar>::kRowStride / kDotRows<bfloat16>;  // Elements, of A

// Weight rows that are multiplied side by side, each from a run of its own. For the fewest the processor looks ahead by
// itself; for others two runs are asked for, into L1.
constexpr int dot_streams(int rows) { return rows <= 2 ? 4 : 2; }
inline constexpr int kDotBytesAhead = 3 << 10;

// The sum of v[i]'s lanes becomes lane i: pairs of neighbours first, within 16 bytes, then between them.
template <class C, int count = kLanes<C>>
MOE_INLINE Vec<C> fold_lanes(Vec<C>* v) {
  if constexpr (count > 1) {
    constexpr bool within = kLanes<C> / count < 16 / int(sizeof(C));
#pragma GCC unroll 16
    for (int i = 0; i < count; i += 2) {
      unzip<C, within>(v[i], v[i + 1], std::make_integer_sequence<int, kLanes<C>>());
      v[i / 2] = v[i] + v[i + 1];
    }
    return fold_lanes<C, count / 2>(v);
  }
  return v[0];
}

// sums[row * lanes + s * unit] = a[row, depth] . weight[s * run, depth], lane by lane, for each stream s. A block's sum
// starts from zero, as in multiply.h.
template <class Ar, class X, int rows, int streams, int unit, class S>
MOE_INLINE void dot_lanes(const typename Ar::Element* a, const S* weight, int64_t run, int64_t depth,
                          Vec<typename Ar::C>* sums) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  constexpr int64_t kValues = kLanes<C> * Ar::kDepth;
  constexpr bool asked = streams == 2;
  int64_t k = 0;
  do {
    const int64_t begin = k;
    Vec<C> acc[rows][streams] = {};
    const auto add = [&](int64_t n) __attribute__((always_inline)) {
      Vec<Element> values[streams];
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s) values[s] = Reader<Ar, X, S>::along_k(weight + s * run + k, n, 1, false);
#pragma GCC unroll 8
      for (int row = 0; row < rows; ++row) {
        const auto x = load_vector<Element>(a + row * kDotStride<Ar> + k / Ar::kDepth);
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s) acc[row][s] = Ar::step(acc[row][s], x, values[s]);
      }
      k += n;
    };
    const int64_t end = min(k + kBlockSteps * kValues, depth);
    while (k + kValues <= end) {
      if constexpr (asked)
#pragma GCC unroll 4
        for (int s = 0; s < streams; ++s)
          fetch_ahead<1>(weight + s * run + k + kDotBytesAhead / int64_t(sizeof(S)), kValues);
      add(kValues);
    }
    if (k < end) add(end - k);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int s = 0; s < streams; ++s)
        sums[row * kLanes<C> + s * unit] = begin == 0 ? acc[row][s] : sums[row * kLanes<C> + s * unit] + acc[row][s];
  } while (k < depth);
}

// c[rows, cols] (+)= a[rows, depth] . weights[cols, depth]^T: as many columns as are not read side by side one by one.
template <class Ar, class X, int rows, class S>
void dot_columns(const typename Ar::Element* a, const S* weight, int64_t n_stride, int64_t cols, int64_t depth,
                 typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  constexpr int lanes = kLanes<C>, streams = lanes < dot_streams(rows) ? lanes : dot_streams(rows),
                unit = lanes / streams;
  const int64_t run = cols / lanes * unit, rest = run * streams;  // of columns; the first that is in none
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
  Vec<C> sums[rows * lanes] = {};
  for (int64_t col = rest; col < cols; ++col)
    dot_lanes<Ar, X, rows, 1, 1>(a, weight + col * n_stride, 0, depth, sums + (col - rest));
  for (int row = 0; row < rows; ++row)
    join_sum<C>(c + row * kTileCols + rest, fold_lanes<C>(sums + row * lanes), first);
}

// n rows of at most kDotRows.
template <class Ar, class X, int rows = 1, class S>
void dot_rows(int64_t n, const typename Ar::Element* a, const S* weight, int64_t n_stride, int64_t cols, int64_t depth,
              typename Ar::C* c, bool first) {
  if constexpr (rows < kDotRows<S>)
    if (n > rows) return dot_rows<Ar, X, rows + 1>(n, a, weight, n_stride, cols, depth, c, first);
  dot_columns<Ar, X, rows>(a, weight, n_stride, cols, depth, c, first);
}

}  // namespace moe::MOE_ISA
