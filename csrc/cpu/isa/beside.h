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

// The same beside: a piece is a vector of one row.
template <class Ar, class X>
struct RowsBeside {
  static constexpr int kValues = kLanes<typename Ar::C> * Ar::kDepth;
  static_assert(kBlockDepth<Ar> % kValues == 0);

  const TileRows<X, typename Ar::C>* a;
  int64_t begin, end, whole;  // values
  typename Ar::Element* to;
  int64_t block_size;
  Pieces pieces;
  int64_t row = 0, k = 0;

  RowsBeside() = default;
  RowsBeside(const TileRows<X, typename Ar::C>& a, int64_t begin, int64_t end, typename Ar::Element* to,
             int64_t block_size, int64_t turns)
      : a(&a),
        begin(begin),
        end(end),
        whole((end - begin) / kValues * kValues),
        to(to),
        block_size(block_size),
        pieces(Pieces::spread(a.count * (whole / kValues), turns)) {
    if (pieces.left == 0) whole = 0;
  }

  MOE_INLINE void piece() {
    __builtin_prefetch(a->rows[min(row + 1, a->count - 1)] + begin + k, 0, 2);
    store_vector(
        to + k / kBlockDepth<Ar> * block_size + row * RowsOfA<Ar>::kRowStride + k % kBlockDepth<Ar> / Ar::kDepth,
        Reader<Ar, X, X>::along_k(a->rows[row] + begin + k, kValues, a->scale[row], a->scaled));
    k += kValues;
    if (k == whole) k = 0, ++row;
  }

  // What is left, and the values that do not fill a vector.
  void finish() {
    finish_pieces(*this);
    pack_row_blocks<Ar>(*a, begin, end, to, block_size, whole);
  }
};

// A panel of weights with unit stride along K: a piece is a vector of each of a few weight rows, as many as 16 bytes
// hold Elements, transposed 16 bytes at a time.
template <class Ar, class X, class S>
struct PanelBeside {
  static constexpr int kRows = 16 / sizeof(typename Ar::Element), kSteps = kLanes<typename Ar::C>;

  const S *weight, *behind;  // behind: packed after these; asked for
  int64_t n_stride, whole;   // steps
  typename Ar::Element* to;
  Pieces pieces;
  int64_t col = 0, step = 0;

  PanelBeside(const S* weight, const S* behind, int64_t n_stride, int64_t cols, int64_t depth, typename Ar::Element* to,
              int64_t turns)
      : weight(weight),
        behind(behind),
        n_stride(n_stride),
        whole(cols == kPanel<Ar> ? depth / (kSteps * Ar::kDepth) * kSteps : 0),
        to(to),
        pieces(Pieces::spread(kPanel<Ar> / kRows * (whole / kSteps), turns)) {
    if (pieces.left == 0) whole = 0;
  }

  MOE_INLINE void piece() {
    const S* from = weight + col * n_stride + step * Ar::kDepth;
    const S* later = behind + col * n_stride + step * Ar::kDepth;
    Vec<typename Ar::Element> rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      for (int at = 0; at < kSteps * Ar::kDepth; at += kLine / sizeof(S))
        __builtin_prefetch(later + i * n_stride + at, 0, 2);
      rows[i] = Reader<Ar, X, S>::along_k(from + i * n_stride, kSteps * Ar::kDepth, 1, false);
    }
    transpose_units<typename Ar::Element>(rows);
    auto* const at = to + step * kPanel<Ar> + col;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
      store_units(at + i * kPanel<Ar>, kRows * kPanel<Ar>, rows[i],
                  std::make_integer_sequence<int, MOE_VECTOR_BYTES / 16>());
    step += kSteps;
    if (step == whole) step = 0, col += kRows;
  }
};

// Panels of rows that lie across the reduction: a piece is what becomes Elements at a time of a row, or of a pair.
template <class Ar, class X, class Rows>
struct AcrossBeside {
  using C = typename Ar::C;
  using S = typename Rows::Value;
  using Columns = Across<Ar, X, S>;
  // Interleaving is so little work that more of it still hides in the multiply-adds.
  static constexpr int kMost = Columns::kInterleaves ? 8 : kMostPieces;
  static constexpr int64_t kPanelPieces = kPanel<Ar> / Columns::kCols * kBlockSteps;

  Rows rows, behind;                  // behind: packed after these; asked for
  int64_t cols, steps, whole, ahead;  // whole, ahead: steps; ahead: to the row that is asked for
  typename Ar::Element* to;
  Pieces pieces;
  int64_t col = 0, step = 0;

  // contiguous: the columns of a row lie side by side; others are left to packing at once.
  AcrossBeside(const Rows& rows, const Rows& behind, int64_t cols, int64_t depth, typename Ar::Element* to,
               int64_t turns, bool contiguous = true)
      : rows(rows),
        behind(behind),
        cols(cols),
        steps(ceil_div(depth, Ar::kDepth)),
        whole(contiguous && cols % kPanel<Ar> == 0 ? depth / Ar::kDepth : 0),
        to(to),
        pieces(Pieces::spread(cols / Columns::kCols * whole, turns, kMost)) {
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
    for (int i = 0; i < Ar::kDepth; ++i) __builtin_prefetch(from_later.at(k_later + i) + col, 0, 2);
    Columns::store(from, col, scales, rows.scaled,
                   to + (col / kPanel<Ar> * steps + step) * kPanel<Ar> + col % kPanel<Ar>);
    col += Columns::kCols;
    if (col == cols) col = 0, ++step;
  }
};

}  // namespace moe::MOE_ISA
