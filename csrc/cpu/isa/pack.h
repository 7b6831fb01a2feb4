// Copies operands into the blocks that the micro-kernel reads: rounded, widened, paired and transposed as it wants
// them.
#pragma once

#include "cpu/isa/multiply.h"
#include "cpu/isa/transpose.h"

namespace moe::MOE_ISA {

// Values of storage type S, scaled, rounded to X (the dtype of the rows, in which products are formed), as vectors of
// Elements.
template <class Ar, class X, class S>
struct Reader {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  static constexpr int kLanes_ = kLanes<C>;

  // The first n values, then zeros; as they are where they need neither a scale nor another type.
  static MOE_INLINE Packed<C, X> rounded(const S* from, int64_t n, C scale, bool scaled) {
    if constexpr (std::is_same_v<S, X>)
      if (!scaled) return load_packed<C>(from, n);
    auto v = load<C>(from, n);
    if (scaled) v = v * broadcast(scale);
    if (scaled && n < kLanes_) {  // a scale that is not finite makes no zero of a zero
      C values[kLanes_];
      store<C>(values, v);
      v = load<C>(values, n);
    }
    return from_compute<X, C>(v);
  }

  // kLanes Elements along the reduction: the first n values, then zeros.
  static MOE_INLINE Vec<Element> along_k(const S* from, int64_t n, C scale, bool scaled) {
    if constexpr (Ar::kDepth == 1) {
      return to_compute<C, X>(rounded(from, n, scale, scaled));
    } else {
      if constexpr (std::is_same_v<S, X>)
        if (n >= 2 * kLanes_ && !scaled) return load_vector<Element>(from);
      const Packed<C, X> v[2] = {rounded(from, n, scale, scaled),
                                 n > kLanes_ ? rounded(from + kLanes_, n - kLanes_, scale, scaled) : Packed<C, X>{}};
      return bit_cast<Vec<Element>>(v);
    }
  }

  // kLanes Elements across the reduction: n columns from col on of one row, or of two rows (the second may be null)
  // side by side.
  static MOE_INLINE Vec<Element> across_k(const S* const* rows, int64_t col, int64_t n, const C* scale, bool scaled) {
    if constexpr (Ar::kDepth == 1) {
      return to_compute<C, X>(rounded(rows[0] + col, n, scale[0], scaled));
    } else {
      auto low = convert(rounded(rows[0] + col, n, scale[0], scaled), Vec<Element>{});
      if (!rows[1]) return low;
      auto high = convert(rounded(rows[1] + col, n, scale[1], scaled), Vec<Element>{});
      return low | high << 16;
    }
  }
};

// A group of columns of a row, or of two side by side: those that become Elements at a time.
template <class Ar, class X, class S>
struct Across {
  using C = typename Ar::C;
  static constexpr bool kInterleaves = Ar::kDepth == 2 && std::is_same_v<S, X>;  // a vector of each of two rows
  static constexpr int kVectors = 2;                                             // of Elements
  static constexpr int kCols = kVectors * kLanes<C>;
  static_assert(kPanel<Ar> % kCols == 0 && kTileRows % kCols == 0);  // a group lies within a panel

  static MOE_INLINE void read(const S* const* rows, int64_t col, const C* scale, bool scaled,
                              Vec<typename Ar::Element>* to) {
    if constexpr (kInterleaves) {
      if (rows[1] && !scaled)
        return interleave(load_vector<uint16_t>(rows[0] + col), load_vector<uint16_t>(rows[1] + col), to,
                          std::make_integer_sequence<int, kLanes<uint16_t>>());
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v, col += kLanes<C>)
      to[v] = Reader<Ar, X, S>::across_k(rows, col, kLanes<C>, scale, scaled);
  }
  static MOE_INLINE void store(const S* const* rows, int64_t col, const C* scale, bool scaled,
                               typename Ar::Element* to) {
    Vec<typename Ar::Element> vectors[kVectors];
    read(rows, col, scale, scaled, vectors);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) store_vector(to + v * kLanes<C>, vectors[v]);
  }
};

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

// A block for the ragged-M product: row i of it, at to + i * stride, is values k_begin..k_begin+depth of from[i], then
// zeros to the end of a vector.
template <class Ar, class S>
void pack_rows(const S* const* from, const typename Ar::C* scale, bool scaled, int64_t rows, int64_t k_begin,
               int64_t depth, typename Ar::Element* to, int64_t stride) {
  using Read = Reader<Ar, S, S>;
  constexpr int step = kLanes<typename Ar::C> * Ar::kDepth;
  for (int64_t i = 0; i < rows; ++i, to += stride) {
    const S* row = from[i] + k_begin;
    int64_t k = 0;
    for (; k + step <= depth; k += step)
      store_vector(to + k / Ar::kDepth, Read::along_k(row + k, step, scale[i], scaled));
    if (k < depth) store_vector(to + k / Ar::kDepth, Read::along_k(row + k, depth - k, scale[i], scaled));
  }
}

// Row r of a block (or the pair of rows r, r + 1), columns 0..cols, in panels of `panel` columns; the rest of the last
// panel is zeros: its columns are computed, though never stored.
template <class Ar, class X, int panel, class S>
MOE_INLINE void pack_across(const S* const* rows, const typename Ar::C* scale, bool scaled, int64_t cols, int64_t step,
                            int64_t steps, typename Ar::Element* to) {
  using Group = Across<Ar, X, S>;
  constexpr int lanes = kLanes<typename Ar::C>;
  const auto at = [&](int64_t col) { return to + (col / panel * steps + step) * panel + col % panel; };
  int64_t col = 0;
  for (; col + Group::kCols <= cols; col += Group::kCols) Group::store(rows, col, scale, scaled, at(col));
  for (; col < cols; col += lanes)
    store_vector(at(col), Reader<Ar, X, S>::across_k(rows, col, min(cols - col, lanes), scale, scaled));
  for (const int64_t padded = ceil_div(cols, panel) * panel; col < padded; col += lanes)
    store_vector(at(col), Vec<typename Ar::Element>{});
}

// Rows that are packed across the reduction: those of weights whose unit stride runs along N, or of an operand of the
// ragged-K product.
template <class S>
struct StridedRows {
  using Value = S;
  const S* data;
  int64_t stride;
  static constexpr bool scaled = false;

  const S* at(int64_t k) const { return data + k * stride; }
  int scale_at(int64_t) const { return 1; }
};
template <class S, class C>
struct FoundRows {
  using Value = S;
  const S* const* rows;
  const C* scale;
  bool scaled;
  int64_t col_begin;

  const S* at(int64_t k) const { return rows[k] + col_begin; }
  C scale_at(int64_t k) const { return scale[k]; }
};

// The first `cols` columns of rows [depth], from first_step on.
template <class Ar, class X, int panel, class Rows>
void pack_steps(const Rows& rows, int64_t depth, int64_t cols, typename Ar::Element* to, int64_t first_step = 0) {
  using C = typename Ar::C;
  const int64_t steps = ceil_div(depth, Ar::kDepth);
  for (int64_t step = first_step; step < steps; ++step) {
    const int64_t k = step * Ar::kDepth;
    const bool second = Ar::kDepth == 2 && k + 1 < depth;
    const typename Rows::Value* from[2] = {rows.at(k), second ? rows.at(k + 1) : nullptr};
    const C scales[2] = {C(rows.scale_at(k)), second ? C(rows.scale_at(k + 1)) : C(0)};
    pack_across<Ar, X, panel>(from, scales, rows.scaled, cols, step, steps, to);
  }
}

// A square block of weights, kLanes columns by kLanes Elements along K, with each Element's columns side by side.
// Column j lies at row(j). Where it is not whole, `width` columns and `depth` values are there and the others are
// zeros.
template <class Ar, class X, bool whole, class Row>
MOE_INLINE void load_transposed(const Row& row, int64_t width, int64_t depth, Vec<typename Ar::Element>* block) {
  using Read = Reader<Ar, X, std::remove_cvref_t<decltype(*row(0))>>;
  constexpr int lanes = kLanes<typename Ar::C>;
#pragma GCC unroll 16
  for (int j = 0; j < lanes; ++j) {
    if constexpr (whole) block[j] = Read::along_k(row(j), lanes * Ar::kDepth, 1, false);
    else block[j] = j < width ? Read::along_k(row(j), depth, 1, false) : Vec<typename Ar::Element>{};
  }
  transpose<typename Ar::Element>(block);
}

// Panels of `cols` columns of an expert's weights, with unit stride along K or along N, from first_step on.
template <class Ar, class X, class S>
void pack_weights(const S* weight, int64_t n_stride, int64_t k_stride, int64_t cols, int64_t depth,
                  typename Ar::Element* to, int64_t first_step = 0) {
  using Element = typename Ar::Element;
  constexpr int lanes = kLanes<typename Ar::C>, panel = kPanel<Ar>;
  if (k_stride == 1) {
    const int64_t steps = ceil_div(depth, Ar::kDepth);
    for (int64_t col = 0; col < ceil_div(cols, panel) * panel; col += lanes) {
      Element* panel_to = to + col / panel * panel * steps + col % panel;
      int64_t step = first_step;
      const auto row = [&](int j) { return weight + (col + j) * n_stride + step * Ar::kDepth; };
      Vec<Element> block[lanes];
      for (; col + lanes <= cols && (step + lanes) * Ar::kDepth <= depth; step += lanes) {
        load_transposed<Ar, X, true>(row, lanes, depth, block);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store_vector(panel_to + (step + i) * panel, block[i]);
      }
      for (; step < steps; step += lanes) {
        load_transposed<Ar, X, false>(row, cols - col, depth - step * Ar::kDepth, block);
        for (int64_t i = 0; i < min(steps - step, lanes); ++i) store_vector(panel_to + (step + i) * panel, block[i]);
      }
    }
  } else {
    pack_steps<Ar, X, panel>(StridedRows<S>{weight, k_stride}, depth, cols, to, first_step);
  }
}

}  // namespace moe::MOE_ISA
