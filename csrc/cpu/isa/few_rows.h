// Few rows (the fewest along the reduction: dot_rows.h): bound by reading the weights, which are read once, where they
// lie. Where their unit stride runs across the reduction, vectors of a row are multiplied as they are. Where it runs
// along, a square of them is transposed in registers and multiplied there, never packed. Sums run in the order and in
// the blocks of multiply.h, so that a row's result does not depend on which of the two files computed it.
#pragma once

#include <bit>

#include "cpu/isa/pack.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

// The most rows that are few: their accumulators and a block share the registers. Between rows of A lie as many
// Elements as a tile's block of A has room for, whole blocks of the reduction, so that every address is a register plus
// a constant.
inline constexpr int kFewRows = kMicroRows;
template <class Ar>
inline constexpr int64_t kFewRowsStride = kTileRows / kFewRows * RowsOfA<Ar>::kRowStride / kBlockSteps * kBlockSteps;

inline constexpr int kAcrossSteps = 10;  // steps of all columns that are multiplied, and asked for ahead, at a time

// Runs that a tile's weight rows are cut into, and the rows of each that a vector takes: as many as 16 bytes hold sums.
inline constexpr int kRuns = MOE_VECTOR_BYTES / 16;
template <class C>
inline constexpr int kUnit = 16 / sizeof(C);

// The weight rows of a vector's lanes: the next kUnit of each run, so that memory is read in kRuns long streams and
// sums are put in order 16 bytes at a time.
template <class C, class S>
struct LaneRows {
  const S* first;
  int64_t stride, run;  // between rows; between runs

  MOE_INLINE const S* operator()(int lane) const { return first + lane / kUnit<C> * run + lane % kUnit<C> * stride; }
};

// The rows that come next, asked for in the order in which they lie, at each square as many lines as it reads itself.
template <class Ar, class S>
struct NextRows {
  using C = typename Ar::C;
  static constexpr int kBytes = kUnit<C> * kLanes<C> * Ar::kDepth * sizeof(S);  // that a square reads of a run
  static constexpr int kLines = kBytes < kLine ? 1 : kBytes / kLine;

  LaneRows<C, S> rows;
  int64_t lines, left;  // of a row; of each run, to be asked for
  int64_t line = 0;

  MOE_INLINE void ask() {
    for (int i = 0; i < kLines && left > 0; ++i, --left) {
#pragma GCC unroll 4
      for (int run = 0; run < kRuns; ++run)
        __builtin_prefetch(rows.first + run * rows.run + line * int64_t(kLine / sizeof(S)));
      if (++line == lines) line = 0, rows.first += rows.stride;
    }
  }
};

// acc[rows] += a[rows, kLanes Elements] . block of weights.
template <class Ar, class X, bool whole, int rows, class S>
MOE_INLINE void few_rows_block(const typename Ar::Element* a, const LaneRows<typename Ar::C, S>& weights, int64_t width,
                               int64_t depth, Vec<typename Ar::C>* acc) {
  constexpr int lanes = kLanes<typename Ar::C>;
  Vec<typename Ar::Element> block[lanes];
  load_transposed<Ar, X, whole>(weights, width, depth, block);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i)
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row)
      acc[row] = Ar::step(acc[row], broadcast(a[row * kFewRowsStride<Ar> + i]), block[i]);
}

// c[rows, kLanes] (+)= a[rows, depth] . weights[kLanes, depth]^T, of which `width` columns are there.
template <class Ar, class X, class S, int rows>
MOE_INLINE void few_rows_columns(const typename Ar::Element* a, LaneRows<typename Ar::C, S> weights,
                                 NextRows<Ar, S> next, int64_t width, int64_t depth, typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  constexpr int64_t step = kLanes<C> * Ar::kDepth;
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlockDepth<Ar>) {
    const int64_t end = min(begin + kBlockDepth<Ar>, depth);
    Vec<C> acc[rows] = {};
    int64_t k = begin;
    for (; width >= kLanes<C> && k + step <= end; k += step, weights.first += step) {
      few_rows_block<Ar, X, true, rows>(a + k / Ar::kDepth, weights, width, end - k, acc);
      next.ask();
    }
    for (; k < end; k += step, weights.first += step)
      few_rows_block<Ar, X, false, rows>(a + k / Ar::kDepth, weights, width, end - k, acc);
    for (int row = 0; row < rows; ++row) join_sum<C>(c + row * kTileCols, acc[row], first && begin == 0);
  }
}

// Below two thirds of kFewRows the rows double: fewer take no less time, as sums wait for their own last addition.
constexpr int more_rows(int rows) { return 3 * rows < 2 * kFewRows ? 2 * rows : rows + 1; }

// The rows that are computed for `count` of them.
inline int64_t rows_taken(int64_t count) {
  int rows = 1;
  while (rows < count) rows = more_rows(rows);
  return rows;
}

// Zeros the rows that are taken besides: what they hold is multiplied, though never stored.
template <class Ar>
void clear_rows_besides(int64_t count, int64_t depth, typename Ar::Element* a) {
  const int64_t read = round_to_lanes<typename Ar::C>(ceil_div(depth, Ar::kDepth));
  for (int64_t row = count; row < rows_taken(count); ++row)
    std::memset(a + row * kFewRowsStride<Ar>, 0, read * sizeof(*a));
}

// c[n, cols] (+)= a[n, depth] . weights[cols, depth]^T, in the order of LaneRows: columns_in_order puts them in their
// places. behind: as many columns that are multiplied next, or null; asked for.
template <class Ar, class X, class S, int rows = 1>
void multiply_few_squares(int64_t n, const typename Ar::Element* a, const S* weight, const S* behind, int64_t n_stride,
                          int64_t cols, int64_t depth, typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  constexpr int lanes = kLanes<C>;
  if constexpr (rows < kFewRows) {
    if (n > rows)
      return multiply_few_squares<Ar, X, S, more_rows(rows)>(n, a, weight, behind, n_stride, cols, depth, c, first);
  }
  const int64_t groups = cols / lanes, rest = groups * lanes, unit = kUnit<C> * n_stride, run = groups * unit;
  const int64_t lines = depth * int64_t(sizeof(S)) / kLine;
  for (int64_t i = 0; i < groups; ++i) {
    const S* next = i + 1 < groups ? weight + (i + 1) * unit : behind;
    few_rows_columns<Ar, X, S, rows>(a, {weight + i * unit, n_stride, run},
                                     {{next, n_stride, run}, lines, next ? lines * kUnit<C> : 0}, lanes, depth,
                                     c + i * lanes, first);
  }
  if (rest < cols)
    few_rows_columns<Ar, X, S, rows>(a, {weight + rest * n_stride, n_stride, unit}, {}, cols - rest, depth, c + rest,
                                     first);
}

template <class C>
void columns_in_order(int64_t rows, int64_t cols, C* c) {
  const int64_t groups = cols / kLanes<C>;
  C by_lane[kTileCols];
  for (int64_t row = 0; row < rows; ++row, c += kTileCols) {
    std::memcpy(by_lane, c, groups * kLanes<C> * sizeof(C));
    for (int64_t i = 0; i < groups; ++i)
      store_units<C>(c + i * kUnit<C>, groups * kUnit<C>, load_vector<C>(by_lane + i * kLanes<C>),
                     std::make_integer_sequence<int, kRuns>());
  }
}

// sums[rows, cols] += a[rows, depth] . weights[depth, cols], the first `vectors` of cols. Their lines kAcrossSteps
// further along the reduction are asked for.
template <class Ar, class X, class S, int rows, int vectors>
void few_rows_across(const typename Ar::Element* a, const S* weight, int64_t k_stride, int64_t cols, int64_t depth,
                     typename Ar::C* sums) {
  using C = typename Ar::C;
  using Group = Across<Ar, X, S>;
  constexpr int lanes = kLanes<C>, kGroup = vectors > 1 ? Group::kVectors : 1;
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
    for (int v = 0; v < vectors; v += kGroup) {
      Vec<typename Ar::Element> values[kGroup];
      if constexpr (vectors > 1) Group::read(at, v * lanes, scales, false, values);
      else values[0] = Reader<Ar, X, S>::across_k(at, 0, cols, scales, false);
#pragma GCC unroll 2
      for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 16
        for (int row = 0; row < rows; ++row)
          acc[row][v + i] = Ar::step(acc[row][v + i], broadcast(a[row * kFewRowsStride<Ar>]), values[i]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < rows; ++row)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store_vector(sums + row * kTileCols + v * lanes, acc[row][v]);
}

// The same for all columns, as many vectors at a time as fit.
template <class Ar, class X, class S, int rows, int vectors>
void few_rows_of_all(const typename Ar::Element* a, const S* weight, int64_t k_stride, int64_t cols, int64_t depth,
                     typename Ar::C* sums) {
  constexpr int64_t kCols = vectors * kLanes<typename Ar::C>;
  for (; cols >= kCols || (vectors == 1 && cols > 0); weight += kCols, sums += kCols, cols -= kCols)
    few_rows_across<Ar, X, S, rows, vectors>(a, weight, k_stride, cols, depth, sums);
  if constexpr (vectors > 1) few_rows_of_all<Ar, X, S, rows, vectors / 2>(a, weight, k_stride, cols, depth, sums);
}

// c[n, cols] (+)= a[n, depth] . weights[depth, cols]: a few steps of all columns at a time, so that rows of weights are
// read in runs as long as the tile is wide.
template <class Ar, class X, class S, int rows = 1>
void multiply_few_across(int64_t n, const typename Ar::Element* a, const S* weight, int64_t k_stride, int64_t cols,
                         int64_t depth, typename Ar::C* c, bool first) {
  using C = typename Ar::C;
  constexpr int lanes = kLanes<C>, vectors = int(std::bit_floor(unsigned(kMicroRows * kMicroVectors / rows)));
  constexpr int64_t kChunk = kAcrossSteps * Ar::kDepth;
  if constexpr (rows < kFewRows) {
    if (n > rows) return multiply_few_across<Ar, X, S, more_rows(rows)>(n, a, weight, k_stride, cols, depth, c, first);
  }
  alignas(64) C sums[rows * kTileCols];
  for (int64_t begin = 0; begin < depth || begin == 0; begin += kBlockDepth<Ar>) {
    const int64_t end = min(begin + kBlockDepth<Ar>, depth);
    std::memset(sums, 0, sizeof(sums));
    for (int64_t k = begin; k < end; k += kChunk)
      few_rows_of_all<Ar, X, S, rows, vectors>(a + k / Ar::kDepth, weight + k * k_stride, k_stride, cols,
                                               min(end - k, kChunk), sums);
    for (int row = 0; row < rows; ++row)
      for (int64_t col = 0; col < cols; col += lanes)
        join_sum<C>(c + row * kTileCols + col, load_vector<C>(sums + row * kTileCols + col), first && begin == 0);
  }
}

}  // namespace moe::MOE_ISA
