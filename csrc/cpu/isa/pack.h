// Copies operands into the blocks that the micro-kernel reads: rounded, widened, paired and transposed as it wants
// them.
#pragma once

#include "cpu/isa/multiply.h"

namespace moe::MOE_ISA {

// Values of storage type S, scaled, rounded to X (the dtype of the rows, in which products are formed), as vectors of
// Elements.
template <class Ar, class X, class S>
struct Reader {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  static constexpr int kLanes_ = kLanes<C>;

  static MOE_INLINE Packed<C, X> rounded(const S* from, int64_t n, C scale, bool scaled) {
    auto v = load<C>(from, n);
    if (scaled) v = v * broadcast(scale);
    return from_compute<X, C>(v);
  }

  // kLanes Elements along the reduction: the first n values, then zeros.
  static MOE_INLINE Vec<Element> along_k(const S* from, int64_t n, C scale, bool scaled) {
    if constexpr (Ar::kDepth == 1) {
      return to_compute<C, X>(rounded(from, n, scale, scaled));
    } else {
      Packed<C, X> v[2];
      if constexpr (std::is_same_v<S, X>) {
        if (!scaled) {
          Vec<Element> pairs{};
          std::memcpy(&pairs, from, n >= 2 * kLanes_ ? sizeof(pairs) : n * sizeof(S));
          return pairs;
        }
      }
      v[0] = rounded(from, n, scale, scaled);
      v[1] = n > kLanes_ ? rounded(from + kLanes_, n - kLanes_, scale, scaled) : Packed<C, X>{};
      return bit_cast<Vec<Element>>(v);
    }
  }

  // kLanes Elements across the reduction: n columns of one row, or of two rows (the second may be null) side by side.
  static MOE_INLINE Vec<Element> across_k(const S* const* rows, int64_t n, const C* scale, bool scaled) {
    if constexpr (Ar::kDepth == 1) {
      return to_compute<C, X>(rounded(rows[0], n, scale[0], scaled));
    } else {
      auto low = __builtin_convertvector(rounded(rows[0], n, scale[0], scaled), Vec<Element>);
      if (!rows[1]) return low;
      auto high = __builtin_convertvector(rounded(rows[1], n, scale[1], scaled), Vec<Element>);
      return low | high << 16;
    }
  }
};

// rows[i][j] becomes rows[j][i], in log2(n) rounds of exchanges between rows `step` apart.
template <class E, int step, int... lane>
MOE_INLINE void exchange(Vec<E>& a, Vec<E>& b, std::integer_sequence<int, lane...>) {
  constexpr int n = kLanes<E>;
  const Vec<E> low = __builtin_shufflevector(a, b, ((lane & step) ? n + lane - step : lane)...);
  const Vec<E> high = __builtin_shufflevector(a, b, ((lane & step) ? n + lane : lane + step)...);
  a = low;
  b = high;
}

template <class E, int step = 1>
MOE_INLINE void transpose(Vec<E>* rows) {
  constexpr int n = kLanes<E>;
  if constexpr (step < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & step)) exchange<E, step>(rows[i], rows[i + step], std::make_integer_sequence<int, n>());
    transpose<E, 2 * step>(rows);
  }
}

// The slot of a row, kept within the slots there are whatever the plan says.
inline int64_t slot_of(const GatheredRows& rows, int64_t row) {
  const int64_t slot = rows.row_slot[row], last = rows.num_rows * rows.width - 1;
  return slot < 0 ? 0 : slot > last ? last : slot;
}

// Where rows row_begin.. of an operand lie, and what they are scaled by.
template <class S, class C>
void find_rows(const GatheredRows& rows, int64_t row_begin, int64_t n, const S** from, C* scale) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = rows.row_slot ? slot_of(rows, row_begin + i) : row_begin + i;
    from[i] = static_cast<const S*>(rows.rows.data) + slot / rows.width * rows.rows.stride;
    scale[i] = rows.scale ? read<C>(rows.scale, slot) : C(1);
  }
}

// A block for the ragged-M product: row i of it is values k_begin..k_begin+depth of from[i].
template <class Ar, class S>
void pack_rows(const S* const* from, const typename Ar::C* scale, bool scaled, int64_t rows, int64_t k_begin,
               int64_t depth, typename Ar::Element* to) {
  using Read = Reader<Ar, S, S>;
  constexpr int step = kLanes<typename Ar::C> * Ar::kDepth;
  for (int64_t i = 0; i < rows; ++i, to += RowsOfA<Ar>::kRowStride)
    for (int64_t k = 0; k < depth; k += step) {
      const auto v = Read::along_k(from[i] + k_begin + k, depth - k, scale[i], scaled);
      std::memcpy(to + k / Ar::kDepth, &v, sizeof(v));
    }
}

// Rows r (or pairs of rows) of an operand of the ragged-K product: `cols` columns of each, in panels of `panel`
// columns. The last panel is filled up with zeros: its columns are computed, though never stored.
template <class Ar, int panel, class S>
void pack_columns(const S* const* from, const typename Ar::C* scale, bool scaled, int64_t depth, int64_t col_begin,
                  int64_t cols, typename Ar::Element* to) {
  using Read = Reader<Ar, S, S>;
  constexpr int lanes = kLanes<typename Ar::C>;
  const int64_t steps = ceil_div(depth, Ar::kDepth);
  const int64_t padded = ceil_div(cols, kPanel<Ar>) * kPanel<Ar>;
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t col = 0; col < padded; col += lanes) {
      const int64_t r = step * Ar::kDepth;
      const S* rows[2] = {from[r] + col_begin + col,
                          Ar::kDepth == 2 && r + 1 < depth ? from[r + 1] + col_begin + col : nullptr};
      const typename Ar::C scales[2] = {scale[r], rows[1] ? scale[r + 1] : 0};
      const auto v = Read::across_k(rows, cols > col ? cols - col : 0, scales, scaled);
      std::memcpy(to + (col / panel * steps + step) * panel + col % panel, &v, sizeof(v));
    }
}

// A run of columns of a weight tile: weight rows begin, begin + step, ...
struct Columns {
  int64_t begin, step, count;
};

// Panels of one run of columns of an expert's weights, [N, K] with unit stride along K or along N.
template <class Ar, class X, class S>
void pack_weights(const S* weight, int64_t n_stride, int64_t k_stride, Columns columns, int64_t k_begin, int64_t depth,
                  typename Ar::Element* to) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  using Read = Reader<Ar, X, S>;
  constexpr int lanes = kLanes<C>, panel = kPanel<Ar>;
  const int64_t steps = ceil_div(depth, Ar::kDepth);
  n_stride *= columns.step;
  weight += columns.begin * (n_stride / columns.step) + k_begin * k_stride;
  for (int64_t col = 0; col < columns.count; col += lanes) {
    const int64_t width = columns.count - col < lanes ? columns.count - col : lanes;
    const S* from = weight + col * n_stride;
    Element* panel_to = to + col / panel * panel * steps + col % panel;
    if (k_stride == 1) {
      for (int64_t step = 0; step < steps; step += lanes) {
        const S* corner = from + step * Ar::kDepth;
        const int64_t left = depth - step * Ar::kDepth, valid = steps - step < lanes ? steps - step : lanes;
        if (width == lanes && left >= lanes * Ar::kDepth) {  // a whole block, which stays in registers
          Vec<Element> block[lanes];
#pragma GCC unroll 16
          for (int j = 0; j < lanes; ++j) block[j] = Read::along_k(corner + j * n_stride, lanes * Ar::kDepth, 1, false);
          transpose<Element>(block);
#pragma GCC unroll 16
          for (int i = 0; i < lanes; ++i) std::memcpy(panel_to + (step + i) * panel, &block[i], sizeof(block[i]));
        } else {
          Vec<Element> block[lanes] = {};
          for (int64_t j = 0; j < width; ++j) block[j] = Read::along_k(corner + j * n_stride, left, 1, false);
          transpose<Element>(block);
          for (int64_t i = 0; i < valid; ++i) std::memcpy(panel_to + (step + i) * panel, &block[i], sizeof(block[i]));
        }
      }
    } else {
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t k = step * Ar::kDepth;
        S row[2][lanes] = {};
        const S* rows[2];
        for (int half = 0; half < Ar::kDepth; ++half) {
          rows[half] = k + half < depth ? from + (k + half) * k_stride : nullptr;
          if (n_stride != 1 && rows[half]) {
            for (int64_t j = 0; j < width; ++j) row[half][j] = rows[half][j * n_stride];
            rows[half] = row[half];
          }
        }
        const C scales[2] = {1, 1};
        const auto v = Read::across_k(rows, width, scales, false);
        std::memcpy(panel_to + step * panel, &v, sizeof(v));
      }
    }
  }
  // As above, zeros up to the end of the last panel.
  const int64_t padded = ceil_div(columns.count, panel) * panel;
  for (int64_t col = round_to_lanes<C>(columns.count); col < padded; col += lanes)
    for (int64_t step = 0; step < steps; ++step)
      std::memset(to + (col / panel * steps + step) * panel + col % panel, 0, lanes * sizeof(Element));
}

}  // namespace moe::MOE_ISA
