// Packing beside the multiply-adds: what pack.h does at once, in pieces small enough for the registers that the
// micro-kernel leaves free between two turns. Pieces are whole vectors, up to `whole`; packing at once does the rest.
#pragma once

#include "cpu/isa/stream.h"
#include "cpu/isa/tile.h"

namespace moe::MOE_ISA {

// Values begin + done..end along K of a tile's rows, at once, in blocks of kBlockDepth that lie block_size apart.
template <class Ar, class X>
void pack_row_blocks(const TileRows<X, typename Ar::C>& a, int64_t begin, int64_t end, typename Ar::Element* to,
                     int64_t block_size, int64_t done = 0) {
  for (int64_t k = begin + done; k < end;) {
    const int64_t block = (k - begin) / kBlockDepth<Ar>, in_block = (k - begin) % kBlockDepth<Ar>;
    const int64_t depth = min(end - k, kBlockDepth<Ar> - in_block);
    pack_rows<Ar>(a.rows, a.scale, a.scaled, a.count, k, depth, to + block * block_size + in_block / Ar::kDepth,
                  RowsOfA<Ar>::kRowStride);
    k += depth;
  }
}

// The same beside: a piece is two vectors of one row.
template <class Ar, class X>
struct RowsBeside {
  static constexpr int kVector = kLanes<typename Ar::C> * Ar::kDepth, kValues = 2 * kVector;
  static_assert(kBlockDepth<Ar> % kValues == 0);

  const TileRows<X, typename Ar::C>* a;
  int64_t begin, end, whole;      // values
  typename Ar::Element *to, *at;  // the first block; where the next piece goes
  int64_t block_size;
  Pieces pieces;
  int64_t row = 0, k = 0, in_block = 0;  // of the next piece: its values from begin, and from its block's start

  RowsBeside() = default;
  RowsBeside(const TileRows<X, typename Ar::C>& a, int64_t begin, int64_t end, typename Ar::Element* to,
             int64_t block_size, int64_t turns)
      : a(&a),
        begin(begin),
        end(end),
        whole((end - begin) / kValues * kValues),
        to(to),
        at(to),
        block_size(block_size),
        pieces(Pieces::spread(a.count * (whole / kValues), turns)) {
    if (pieces.left == 0) whole = 0;
  }

  MOE_INLINE void piece() {
    const X *const from = a->rows[row] + begin + k, *const next = a->rows[min(row + 1, a->count - 1)] + begin + k;
#pragma GCC unroll 2
    for (int i = 0; i < kValues; i += kVector) {
      __builtin_prefetch(next + i, 0, 2);
      store_vector(at + i / Ar::kDepth, Reader<Ar, X, X>::along_k(from + i, kVector, a->scale[row], a->scaled));
    }
    k += kValues, in_block += kValues, at += kValues / Ar::kDepth;
    if (in_block == kBlockDepth<Ar>) at += block_size - kBlockSteps, in_block = 0;
    if (k == whole) k = in_block = 0, at = to + ++row * RowsOfA<Ar>::kRowStride;
  }

  // What is left, and the values that do not fill a piece.
  void finish() {
    finish_pieces(*this);
    pack_row_blocks<Ar>(*a, begin, end, to, block_size, whole);
  }
};

// A panel of weights with unit stride along K: a piece is a vector of each of a few weight rows, as many as 16 bytes
// hold Elements, transposed 16 bytes at a time. by_steps: of all rows, then their next ones, so that a line of the
// panel is filled while it is in L1; otherwise along these rows, then the next rows. What is asked for always goes
// along rows.
template <class Ar, class X, class S, bool by_steps>
struct PanelBeside {
  using Element = typename Ar::Element;
  static constexpr int kRows = 16 / sizeof(Element), kSteps = kLanes<typename Ar::C>, kValues = kSteps * Ar::kDepth;
  static constexpr int kMost = kMostPieces, kPanelPieces = kPanel<Ar> / kRows * (kBlockSteps / kSteps);

  const S *weight, *behind;  // behind: packed after these; asked for
  int64_t n_stride, whole;   // steps
  Element* to;
  Pieces pieces;
  struct Place {
    int64_t col = 0, step = 0;
  } at, asked;

  PanelBeside(const S* weight, const S* behind, int64_t n_stride, int64_t cols, int64_t depth, Element* to,
              int64_t turns)
      : weight(weight),
        behind(behind),
        n_stride(n_stride),
        whole(cols == kPanel<Ar> ? depth / kValues * kSteps : 0),
        to(to),
        pieces(Pieces::spread(kPanel<Ar> / kRows * (whole / kSteps), turns, kMost)) {
    if (pieces.left == 0) whole = 0;
  }

  MOE_INLINE void along_rows(Place& place) const {
    place.step += kSteps;
    if (place.step == whole) place.step = 0, place.col += kRows;
  }
  MOE_INLINE void across_rows(Place& place) const {
    place.col += kRows;
    if (place.col == kPanel<Ar>) place.col = 0, place.step += kSteps;
  }
  MOE_INLINE const S* place_in(const S* rows, Place place) const {
    return rows + place.col * n_stride + place.step * Ar::kDepth;
  }
  // A piece asks for all its lines before it loads: in turn, row by row, was 1 to 4 % slower.
  MOE_INLINE void ask() {
    const S* const later = place_in(behind, asked);
    for (int i = 0; i < kRows; ++i)
      for (int k = 0; k < kValues; k += kLine / sizeof(S)) __builtin_prefetch(later + i * n_stride + k, 0, 2);
    along_rows(asked);
  }
  MOE_INLINE void piece() {
    ask();
    const S* const from = place_in(weight, at);
    Vec<Element> rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) rows[i] = Reader<Ar, X, S>::along_k(from + i * n_stride, kValues, 1, false);
    transpose_units<Element>(rows);
    Element* const first = to + at.step * kPanel<Ar> + at.col;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
      store_units(first + i * kPanel<Ar>, kRows * kPanel<Ar>, rows[i],
                  std::make_integer_sequence<int, MOE_VECTOR_BYTES / 16>());
    if constexpr (by_steps) across_rows(at);
    else along_rows(at);
  }
};

// Panels of rows that lie across the reduction: a piece is kGroups groups of columns of a row, or of a pair.
template <class Ar, class X, class Rows>
struct AcrossBeside {
  using C = typename Ar::C;
  using S = typename Rows::Value;
  using Group = Across<Ar, X, S>;
  // Copying is little work, and interleaving less still; registers narrower than AVX-512's leave no room for it.
  static constexpr int kGroups = MOE_VECTOR_BYTES < 64 ? 1 : 2, kCols = kGroups * Group::kCols;
  static constexpr int kMost = kGroups == 1 ? 1 : Group::kInterleaves ? 4 : 2;
  static constexpr int kLineCols = Group::kCols * int(sizeof(S)) > kLine ? kLine / int(sizeof(S)) : Group::kCols;
  static constexpr int kPanelPieces = kPanel<Ar> * kBlockSteps / kCols;

  Rows rows, behind;                  // behind: packed after these; asked for
  int64_t cols, steps, whole, ahead;  // whole, ahead: steps; ahead: to the row that is asked for
  typename Ar::Element* to;
  Pieces pieces;
  int64_t col = 0, step = 0;

  AcrossBeside(const Rows& rows, const Rows& behind, int64_t cols, int64_t depth, typename Ar::Element* to,
               int64_t turns)
      : rows(rows),
        behind(behind),
        cols(cols),
        steps(ceil_div(depth, Ar::kDepth)),
        whole(cols % kPanel<Ar> == 0 && cols % kCols == 0 ? depth / Ar::kDepth : 0),
        to(to),
        pieces(Pieces::spread(cols / kCols * whole, turns, kMost)) {
    if (pieces.left == 0) whole = 0;
    ahead = min(whole, 24);
  }

  MOE_INLINE void piece() {
    const int64_t k = step * Ar::kDepth, second = k + Ar::kDepth - 1;
    const S* const from[2] = {rows.at(k), rows.at(second)};
    const C scales[2] = {C(rows.scale_at(k)), C(rows.scale_at(second))};
    const int64_t later = step + ahead;
    const Rows& from_later = later < whole ? rows : behind;
    const int64_t k_later = (later < whole ? later : later - whole) * Ar::kDepth;
    for (int i = 0; i < Ar::kDepth; ++i) {
      const S* const asked = from_later.at(k_later + i);
      if (col == 0) __builtin_prefetch(asked, 0, 2);
      // The last column of each line: rows may begin within one.
      for (int last = kLineCols - 1; last < kCols; last += kLineCols) __builtin_prefetch(asked + col + last, 0, 2);
    }
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; ++i, col += Group::kCols)
      Group::store(from, col, scales, rows.scaled,
                   to + (col / kPanel<Ar> * steps + step) * kPanel<Ar> + col % kPanel<Ar>);
    if (col == cols) col = 0, ++step;
  }
};

}  // namespace moe::MOE_ISA
