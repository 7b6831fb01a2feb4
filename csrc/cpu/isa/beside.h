// Packing beside the multiply-adds: what pack.h does at once, in pieces small enough for the registers that the
// micro-kernel leaves free between two turns (Beside). Pieces are whole vectors: up to `whole`; packing at once does
// the rest.
#pragma once

#include "cpu/isa/tile.h"

namespace moe::MOE_ISA {

// Values begin..end along K of a tile's rows, in blocks of kBlockDepth that lie block_size apart: a piece is a vector
// of one row.
template <class Ar, class X>
struct RowsBeside {
  static constexpr int kValues = kLanes<typename Ar::C> * Ar::kDepth;
  static_assert(kBlockDepth<Ar> % kValues == 0);

  const TileRows<X, typename Ar::C>* a;
  int64_t begin, whole;
  typename Ar::Element* to;
  int64_t block_size;
  Beside pieces;
  int64_t row = 0, k = 0;

  RowsBeside() = default;
  RowsBeside(const TileRows<X, typename Ar::C>& a, int64_t begin, int64_t end, typename Ar::Element* to,
             int64_t block_size, int64_t turns)
      : a(&a),
        begin(begin),
        whole((end - begin) / kValues * kValues),
        to(to),
        block_size(block_size),
        pieces(Beside::spread(a.count * (whole / kValues), turns)) {}

  MOE_INLINE void piece() {
    __builtin_prefetch(a->rows[min(row + 1, a->count - 1)] + begin + k, 0, 2);
    store_vector(
        to + k / kBlockDepth<Ar> * block_size + row * RowsOfA<Ar>::kRowStride + k % kBlockDepth<Ar> / Ar::kDepth,
        Reader<Ar, X, X>::along_k(a->rows[row] + begin + k, kValues, a->scale[row], a->scaled));
    k += kValues;
    if (k == whole) k = 0, ++row;
  }
};

// The same at once, from `done` values on.
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

// A panel of weights with unit stride along K: a piece is a vector of each of a few weight rows, as many as 16 bytes
// hold Elements, transposed 16 bytes at a time.
template <class Ar, class X, class S>
struct PanelBeside {
  static constexpr int kRows = 16 / sizeof(typename Ar::Element), kSteps = kLanes<typename Ar::C>;

  const S *weight, *behind;  // behind: what is packed next
  int64_t n_stride, whole;
  typename Ar::Element* to;
  Beside pieces;
  int64_t col = 0, step = 0;

  MOE_INLINE void piece() {
    const S* from = weight + col * n_stride + step * Ar::kDepth;
    const S* later = col + kRows < kPanel<Ar> ? from + kRows * n_stride : behind + step * Ar::kDepth;
    Vec<typename Ar::Element> rows[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(later + i * n_stride, 0, 2);
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

// Panels of rows that lie across the reduction: a piece is a vector of a row, or of a pair of them.
template <class Ar, class X, class S, class Rows>
struct AcrossBeside {
  static constexpr int kStepsAhead = 8;

  Rows rows, behind;  // behind: those that are packed next
  int64_t cols, steps, whole;
  typename Ar::Element* to;
  Beside pieces;
  int64_t col = 0, step = 0;

  MOE_INLINE void piece() {
    constexpr int lanes = kLanes<typename Ar::C>;
    const int64_t k = step * Ar::kDepth, second = k + Ar::kDepth - 1;
    const S* const from[2] = {rows.at(k) + col, rows.at(second) + col};
    const int64_t later = step + kStepsAhead;
    const Rows& from_later = later < whole ? rows : behind;
    const int64_t k_later = (later < whole ? later : later - whole) * Ar::kDepth;
    for (int i = 0; i < Ar::kDepth; ++i) __builtin_prefetch(from_later.at(k_later + i) + col, 0, 2);
    const typename Ar::C scales[2] = {rows.scale_at(k), rows.scale_at(second)};
    store_vector(to + (col / kPanel<Ar> * steps + step) * kPanel<Ar> + col % kPanel<Ar>,
                 Reader<Ar, X, S>::across_k(from, lanes, scales, rows.scaled));
    col += lanes;
    if (col == cols) col = 0, ++step;
  }
};

}  // namespace moe::MOE_ISA
