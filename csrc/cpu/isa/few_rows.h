// Few rows: bound by reading the weights, which are read once, where they lie. Where their unit stride runs across the
// reduction, vectors of a row are multiplied as they are. Where it runs along, a square of them is transposed in
// registers and multiplied there, never packed. Sums run in the order and in the blocks of multiply.h, so that a row's
// result does not depend on which of the two computed it.
#pragma once

#include <bit>

#include "cpu/isa/pack.h"

namespace moe::MOE_ISA {

// The most rows that are few: their accumulators and a block share the registers. Between rows of A lie as many
// Elements as a tile's block of A has room for, whole blocks of the reduction, so that every address is a register plus
// a constant.
inline constexpr int kFewRows = kMicroRows;
template <class Ar>
inline constexpr int64_t kFewRowsStride = kTileRows / kFewRows * RowsOfA<Ar>::kRowStride / kBlockSteps * kBlockSteps;

inline constexpr int kAcrossSteps = 10;  // steps of all columns that are multiplied, and asked for ahead, at a time

// Weight rows that lie along the reduction, one for each lane: of each of kRuns runs through the tile the next kUnit
// rows, as many as 16 bytes hold sums, so that memory is read in few long streams and sums are put in order a unit at a
// time.
template <class C, class S>
struct LaneRows {
  static constexpr int kUnit = 16 / sizeof(C), kRuns = kLanes<C> / kUnit;

  const S* first;
  int64_t stride, run;  // between rows; between runs

  MOE_INLINE const S* operator()(int lane) const { return first + lane / kUnit * run + lane % kUnit * stride; }
};

// The rows that come next, whose lines are asked for in the order in which they lie, a line of each row for a square.
template <class C, class S>
struct NextRows {
  using Rows = LaneRows<C, S>;
  static constexpr int64_t kLineValues = kLine / sizeof(S);

  Rows rows;
  int64_t lines, line = 0;  // of a row; asked for of this one

  MOE_INLINE void ask() {
    if (!rows.first) return;
    for (int i = 0; i < Rows::kUnit; ++i) {
#pragma GCC unroll 4
      for (int run = 0; run < Rows::kRuns; ++run) __builtin_prefetch(rows.first + run * rows.run + line * kLineValues);
      if (++line == lines) line = 0, rows.first += rows.stride;
    }
  }
};

// acc[rows] += a[rows, kLanes Elements] . block of weights.
template <class Ar, class X, bool whole, int rows, class Row>
MOE_INLINE void few_rows_block(const typename Ar::Element* a, const Row& row, int64_t width, int64_t depth,
                               Vec<typename Ar::C>* acc) {
  constexpr int lanes = kLanes<typename Ar::C>;
  Vec<typename Ar::Element> block[lanes];
  load_transposed<Ar, X, whole>(row, width, depth, block);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) acc[r] = Ar::step(acc[r], broadcast(a[r * kFewRowsStride<Ar> + i]), block[i]);
}

// c[rows, kLanes] (+)= a[rows, depth] . weights[kLanes, depth]^T, of which `width` columns are there.
template <class Ar, class X, class S, int rows>
MOE_INLINE void few_rows_columns(const typename Ar::Element* a, LaneRows<typename Ar::C, S> row,
                                 NextRows<typename Ar::C, S> next, int64_t width, int64_t depth, typename Ar::C* c,
                                 bool first) {
  using C = typename Ar::C;
  constexpr int64_t step = kLanes<C> * Ar::kDepth;
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlockDepth<Ar>) {
    const int64_t end = min(begin + kBlockDepth<Ar>, depth);
    Vec<C> acc[rows] = {};
    int64_t k = begin;
    for (; width >= kLanes<C> && k + step <= end; k += step, row.first += step) {
      few_rows_block<Ar, X, true, rows>(a + k / Ar::kDepth, row, width, end - k, acc);
      next.ask();
    }
    for (; k < end; k += step, row.first += step)
      few_rows_block<Ar, X, false, rows>(a + k / Ar::kDepth, row, width, end - k, acc);
    for (int r = 0; r < rows; ++r) join_sum<C>(c + r * kTileCols, acc[r], first && begin == 0);
  }
}

// Rows are taken in powers of two, then all.
constexpr int more_rows(int rows) { return rows < kFewRows / 2 ? 2 * rows : kFewRows; }

// The rows that are computed for `count` of them.
inline int64_t rows_taken(int64_t count) {
  int rows = 1;
  while (rows < count) rows = more_rows(rows);
  return rows;
}

// c[n, cols] (+)= a[n, depth] . weights[cols, depth]^T, in the order of LaneRows: columns_in_order puts them in their
// places. Behind, if there are any, lie as many columns that are multiplied next.
template <class Ar, class X, class S, int rows = 1>
void multiply_few(int64_t n, const typename Ar::Element* a, const S* weight, const S* behind, int64_t n_stride,
                  int64_t cols, int64_t depth, typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  using Rows = LaneRows<C, S>;
  constexpr int lanes = kLanes<C>;
  if constexpr (rows < kFewRows) {
    if (n > rows) return multiply_few<Ar, X, S, more_rows(rows)>(n, a, weight, behind, n_stride, cols, depth, c, first);
  }
  const int64_t groups = cols / lanes, rest = groups * lanes, lines = depth * int64_t(sizeof(S)) / kLine;
  const int64_t unit = Rows::kUnit * n_stride;
  for (int64_t i = 0; i < groups; ++i) {
    const S* next = i + 1 < groups ? weight + (i + 1) * unit : behind;
    few_rows_columns<Ar, X, S, rows>(a, {weight + i * unit, n_stride, groups * unit},
                                     {{lines ? next : nullptr, n_stride, groups * unit}, lines}, lanes, depth,
                                     c + i * lanes, first);
  }
  if (rest < cols)
    few_rows_columns<Ar, X, S, rows>(a, {weight + rest * n_stride, n_stride, unit}, {}, cols - rest, depth, c + rest,
                                     first);
}

template <class C, class S>
void columns_in_order(int64_t rows, int64_t cols, C* c) {
  using Rows = LaneRows<C, S>;
  const int64_t groups = cols / kLanes<C>;
  C by_lane[kTileCols];
  for (int64_t row = 0; row < rows; ++row, c += kTileCols) {
    std::memcpy(by_lane, c, groups * kLanes<C> * sizeof(C));
    for (int64_t i = 0; i < groups; ++i)
      store_units<C>(c + i * Rows::kUnit, groups * Rows::kUnit, load_vector<C>(by_lane + i * kLanes<C>),
                     std::make_integer_sequence<int, Rows::kRuns>());
  }
}

// sums[rows, cols] += a[rows, depth] . weights[depth, cols], `vectors` side by side. Their lines kAcrossSteps further
// along the reduction are asked for.
template <class Ar, class X, class S, int rows, int vectors>
void few_rows_across(const typename Ar::Element* a, const S* weight, int64_t k_stride, int64_t cols, int64_t depth,
                     typename Ar::C* sums) {
  using C = typename Ar::C;
  constexpr int lanes = kLanes<C>;
  const C scales[2] = {1, 1};
  Vec<C> acc[rows][vectors];
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) acc[row][v] = load_vector<C>(sums + row * kTileCols + v * lanes);
  for (int64_t k = 0; k < depth; k += Ar::kDepth, ++a) {
    const S* at[2] = {weight + k * k_stride, Ar::kDepth == 2 && k + 1 < depth ? weight + (k + 1) * k_stride : nullptr};
    for (int i = 0; i < Ar::kDepth; ++i)
      for (int64_t col = 0; col < vectors * lanes; col += kLine / sizeof(S))
        __builtin_prefetch(weight + (k + i + kAcrossSteps * Ar::kDepth) * k_stride + col, 0, 2);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const S* from[2] = {at[0] + v * lanes, at[1] ? at[1] + v * lanes : nullptr};
      const auto values = Reader<Ar, X, S>::across_k(from, cols - v * lanes, scales, false);
#pragma GCC unroll 16
      for (int row = 0; row < rows; ++row)
        acc[row][v] = Ar::step(acc[row][v], broadcast(a[row * kFewRowsStride<Ar>]), values);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store_vector(sums + row * kTileCols + v * lanes, acc[row][v]);
}

// c[n, cols] (+)= a[n, depth] . weights[depth, cols]: a few steps of all columns at a time, so that rows of weights are
// read in runs as long as the tile is wide.
template <class Ar, class X, class S, int rows = 1>
void multiply_few_across(int64_t n, const typename Ar::Element* a, const S* weight, int64_t k_stride, int64_t cols,
                         int64_t depth, typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  constexpr int lanes = kLanes<C>;
  constexpr int vectors = int(std::bit_floor(unsigned(kMicroRows * kMicroVectors / rows)));
  constexpr int64_t kChunk = kAcrossSteps * Ar::kDepth;
  static_assert(kBlockDepth<Ar> % kChunk == 0);
  if constexpr (rows < kFewRows) {
    if (n > rows) return multiply_few_across<Ar, X, S, more_rows(rows)>(n, a, weight, k_stride, cols, depth, c, first);
  }
  alignas(64) C sums[rows * kTileCols];
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlockDepth<Ar>) {
    const int64_t end = min(begin + kBlockDepth<Ar>, depth);
    std::memset(sums, 0, sizeof(sums));
    for (int64_t k = begin; k < end; k += kChunk) {
      const int64_t steps = min(end - k, kChunk);
      const S* from = weight + k * k_stride;
      int64_t col = 0;
      for (; col + vectors * lanes <= cols; col += vectors * lanes)
        few_rows_across<Ar, X, S, rows, vectors>(a + k / Ar::kDepth, from + col, k_stride, vectors * lanes, steps,
                                                 sums + col);
      for (; col < cols; col += lanes)
        few_rows_across<Ar, X, S, rows, 1>(a + k / Ar::kDepth, from + col, k_stride, cols - col, steps, sums + col);
    }
    for (int row = 0; row < rows; ++row)
      for (int64_t col = 0; col < cols; col += lanes)
        join_sum<C>(c + row * kTileCols + col, load_vector<C>(sums + row * kTileCols + col), first && begin == 0);
  }
}

}  // namespace moe::MOE_ISA
