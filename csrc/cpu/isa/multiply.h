// The micro-kernel: a few rows of A times a panel of B, accumulators in registers. One template for every instruction
// set and both GEMMs; what differs is the arithmetic, where A's next element lies and what takes the sums.
#pragma once

#include "cpu/isa/dot.h"
#include "cpu/isa/stream.h"
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

// Arithmetic on single values: products and sums in C.
template <class C_>
struct Fma {
  using C = C_;
  using Element = C_;               // what A and B are packed as
  static constexpr int kDepth = 1;  // values along the reduction in one Element
  static MOE_INLINE Vec<C> step(Vec<C> acc, Vec<Element> a, Vec<Element> b) { return acc + a * b; }
};

// bf16 in pairs along the reduction.
struct Dot {
  using C = float;
  using Element = uint32_t;
  static constexpr int kDepth = 2;
  static MOE_INLINE Vec<C> step(Vec<C> acc, Vec<Element> a, Vec<Element> b) { return dot_pairs(acc, a, b); }
};

template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, bfloat16> && kHasDot, Dot, Fma<Compute<S>>>;

// Sizes of a tile and of the packed blocks. Accumulators: kMicroRows * kMicroVectors registers of the 32 (AVX-512) or
// 16 there are. A panel of B (kBlockSteps x kPanel) stays in L1 while the rows of an A block pass; two blocks of each
// operand and the tile stay in L2.
inline constexpr int kMicroRows = MOE_VECTOR_BYTES == 64 ? 12 : MOE_VECTOR_BYTES == 32 ? 6 : 4;
inline constexpr int kMicroVectors = 2;
inline constexpr int kBlockSteps = 160;  // Elements along the reduction: 20 KiB of panel and up to 8 KiB of rows
static_assert(kTileRows % kMicroRows == 0);

template <class Ar>
inline constexpr int64_t kBlockDepth = kBlockSteps * Ar::kDepth;  // values along the reduction

// Of a panel's step, in every instruction set, so that weights packed under one serve all.
inline constexpr int kStepBytes = 128;
template <class Ar>
inline constexpr int kPanel = kStepBytes / sizeof(typename Ar::Element);  // columns of a panel
template <class Ar>
inline constexpr int kMicroCols = kMicroVectors * kLanes<typename Ar::C>;  // columns that are multiplied at a time

// Where A lies: element (row, k) of a block at row * kRowStride + k * kStep, both known at compile time so that every
// address is one register plus a constant.
template <class Ar>
struct RowsOfA {  // ragged-M: a row of A is contiguous; the odd line spreads rows over the sets of L1
  static constexpr int kRowStride = kBlockSteps + 16;
  static constexpr int kStep = 1;
};
template <class Ar>
struct ColumnsOfA {  // ragged-K: A is the transpose of rows that lie contiguous
  static constexpr int kRowStride = 1;
  static constexpr int kStep = kTileRows;
};

// Weights that are needed next, packed at once or multiplied where they lie (prepacked.h): at each turn the
// micro-kernel asks for some of their lines, in the order in which they lie, so that they are found in L2. It is copied
// for each call, by 16 bytes: with 40 of them instead of 48 the whole took 4 % longer at 32 rows.
struct alignas(16) Ahead {
  const char* begin = nullptr;    // of the row
  int64_t stride = 0, bytes = 0;  // between rows; of each
  int64_t at = 0, lines = 0;      // where in the row; lines that are left, of all rows

  template <class S>
  static Ahead of(const S* begin, int64_t stride, int64_t rows, int64_t cols) {
    constexpr int64_t size = sizeof(S);
    return {reinterpret_cast<const char*>(begin), stride * size, cols * size, 0, rows * ceil_div(cols * size, kLine)};
  }
  // The share from..to of `all`, where nothing has been asked for yet.
  MOE_INLINE Ahead part(int64_t from, int64_t to, int64_t all) const {
    if (lines == 0) return *this;
    const int64_t of_row = ceil_div(bytes, kLine), first = lines * from / all, row = first / of_row;
    return {begin + row * stride, stride, bytes, (first - row * of_row) * kLine, lines * to / all - first};
  }
  MOE_INLINE void ask(int64_t count) {
    for (; count > 0 && lines > 0; --count, --lines) {
      __builtin_prefetch(begin + at, 0, 2);
      at += kLine;
      if (at >= bytes) at = 0, begin += stride;
    }
  }
};

// Steps of a turn. At each the micro-kernel asks for lines of Ahead and, while it multiplies kMicroRows rows, does some
// pieces of other work: so little at a time costs next to nothing, where the same work between two calls costs its
// time.
inline constexpr int kTurnSteps = 8;
inline constexpr int kMostPieces = 2;  // of most kinds of work at a turn: all at once is faster than more

// Pieces that are left of such work, and how many a turn does: none where it would have to do too many.
struct Pieces {
  int64_t left = 0, each = 0;

  static Pieces spread(int64_t count, int64_t turns, int64_t most = kMostPieces) {
    return count <= most * turns ? Pieces{count, ceil_div(count, turns > 0 ? turns : 1)} : Pieces{};
  }
};

template <class Work>
MOE_INLINE void take_turn(Work& work) {
  for (int64_t i = work.pieces.each; i > 0 && work.pieces.left > 0; --i, --work.pieces.left) work.piece();
}
template <class Work>
void finish_pieces(Work& work) {
  for (; work.pieces.left > 0; --work.pieces.left) work.piece();
}

// A block's sum joins those before. The first is added to zero: a sum that vanishes is +0, whether padded steps
// followed or not.
template <class C>
MOE_INLINE Vec<C> joined(const C* before, Vec<C> sum, bool first) {
  return (first ? Vec<C>{} : load<C>(before)) + sum;
}
template <class C>
MOE_INLINE void join_sum(C* to, Vec<C> sum, bool first) {
  store<C>(to, joined<C>(to, sum, first));
}

// What takes the sums of a block: at(row, col) is where those of a call go, take() puts them there. Here they join a
// tile's.
template <class C>
struct TileSums {
  C* c;
  bool first;

  TileSums at(int64_t row, int64_t col) const { return {c + row * kTileCols + col, first}; }
  template <int rows>
  MOE_INLINE void take(const Vec<C> (&sums)[rows][kMicroVectors]) const {
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kMicroVectors; ++j) join_sum<C>(c + i * kTileCols + j * kLanes<C>, sums[i][j], first);
  }
};

// a[rows, depth] . b[depth, kMicroCols of kPanel], summed in order of depth, which `to` takes. A block's sum starts
// from zero and joins those before at the end: the error grows with the block's depth, not with the length of the whole
// reduction. At each turn a share of the work `beside` is done.
template <class Ar, class Layout, int rows>
void multiply(const typename Ar::Element* a, const typename Ar::Element* b, int64_t depth, const auto& to, Ahead ahead,
              auto&... beside) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  constexpr int lanes = kLanes<C>;
  Vec<C> acc[rows][kMicroVectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kMicroVectors; ++j) acc[i][j] = Vec<C>{};

  const int64_t turns = ceil_div(depth, kTurnSteps), lines_of_turn = turns ? ceil_div(ahead.lines, turns) : 0;
  for (int64_t left = depth; left > 0; left -= kTurnSteps) {
    ahead.ask(lines_of_turn);
    (take_turn(beside), ...);
    const int64_t steps = left < kTurnSteps ? left : kTurnSteps;
    for (int64_t k = 0; k < steps; ++k) {
      Vec<Element> panel[kMicroVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kMicroVectors; ++j) std::memcpy(&panel[j], b + j * lanes, sizeof(panel[j]));
#pragma GCC unroll 16
      for (int i = 0; i < rows; ++i) {
        const Vec<Element> value = broadcast(a[i * Layout::kRowStride]);
#pragma GCC unroll 4
        for (int j = 0; j < kMicroVectors; ++j) acc[i][j] = Ar::step(acc[i][j], value, panel[j]);
      }
      a += Layout::kStep;
      b += kPanel<Ar>;
    }
  }

  to.take(acc);
}

// Any number of rows up to kMicroRows. Fewer have no turns, so that the work beside is compiled into one multiply only.
template <class Ar, class Layout, int rows = kMicroRows>
MOE_INLINE void multiply_rows(int64_t n, const typename Ar::Element* a, const typename Ar::Element* b, int64_t depth,
                              const auto& to, const Ahead& ahead, auto&... beside) {
  if constexpr (rows == 0) return;
  else if (n != rows) multiply_rows<Ar, Layout, rows - 1>(n, a, b, depth, to, ahead, beside...);
  else if constexpr (rows == kMicroRows) multiply<Ar, Layout, rows>(a, b, depth, to, ahead, beside...);
  else multiply<Ar, Layout, rows>(a, b, depth, to, ahead);
}

// Rows of the next call where `left` remain: kMicroRows, or half of what remains where the last call would be left with
// too few sums to hide the latency of an addition.
inline int64_t rows_of_call(int64_t left) {
  constexpr int64_t kEnough = kMicroRows / 3;
  return left > kMicroRows && left < kMicroRows + kEnough ? ceil_div(left, 2) : min(left, kMicroRows);
}

// Turns of a block's product: calls of fewer than kMicroRows have none.
template <class Ar>
int64_t turns_of_block(int64_t rows, int64_t cols, int64_t depth) {
  int64_t calls = rows / kMicroRows;
  if (calls > 0 && rows_of_call(kMicroRows + rows % kMicroRows) < kMicroRows) --calls;
  return calls * ceil_div(cols, kMicroCols<Ar>) * ceil_div(depth, kTurnSteps);
}

// `to` takes the products of A block [rows, depth] and B block [depth, cols], which is packed in panels: `width`
// columns of all rows, then the next ones.
template <class Ar, class Layout>
void multiply_block(const typename Ar::Element* a, const typename Ar::Element* b, int64_t rows, int64_t cols,
                    int64_t depth, int64_t width, const auto& to, const Ahead& ahead, auto&... beside) {
  const int64_t all = rows * ceil_div(cols, kMicroCols<Ar>);
  int64_t done = 0;
  for (int64_t begin = 0; begin < cols; begin += width)
    for (int64_t row = 0, n; row < rows; row += n) {
      n = rows_of_call(rows - row);
      for (int64_t col = begin; col < min(begin + width, cols); col += kMicroCols<Ar>, done += n) {
        const int64_t in_panel = col % kPanel<Ar>;
        multiply_rows<Ar, Layout>(n, a + row * Layout::kRowStride, b + (col - in_panel) * depth + in_panel, depth,
                                  to.at(row, col), ahead.part(done, done + n, all), beside...);
      }
    }
}

}  // namespace moe::MOE_ISA
