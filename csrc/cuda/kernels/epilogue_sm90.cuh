// What a warpgroup on sm_90a does with its sums before they are stored, straight from registers, eight columns of a row
// at a time. Where the activation is gated, gates stand in the first half of a tile's columns and the ups of the same
// inner columns in the second, or, interleaved, side by side. Results have 16 bits.
#pragma once

#include "cuda/arch/tma.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/warpgroup_sums.cuh"

namespace moe {

// f(activation) with the activation's choices as constants of the code, so that a piece takes one branch and nothing of
// what was not chosen; limits and offset apart, see limit_piece.
template <class F>
MOE_INLINE void with_constants(const Activation& activation, const F& f) {
  const auto choose = [&](Act act, double alpha) {
    Activation chosen = activation;
    chosen.act = act, chosen.alpha = alpha;
    chosen.limit = HUGE_VAL, chosen.up_offset = -0.0;  // which leaves even -0 as it is
    if (activation.gated) chosen.gated = true, f(chosen);
    else chosen.gated = false, f(chosen);
  };
  switch (activation.act) {
    case Act::silu: return activation.alpha == 1 ? choose(Act::silu, 1) : choose(Act::silu, activation.alpha);
    case Act::gelu: return choose(Act::gelu, 1);
    case Act::gelu_tanh: return choose(Act::gelu_tanh, 1);
    case Act::relu: return choose(Act::relu, 1);
    case Act::relu2: return choose(Act::relu2, 1);
  }
}

// Whether gates and ups are changed before they are multiplied.
MOE_INLINE bool limits(const Activation& activation) {
  return activation.limit != HUGE_VAL || activation.up_offset != 0;
}

// Gates and ups as with_constants expects them.
template <class Math>
MOE_INLINE void limit_piece(const Activation& activation, GatesUps& h) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    h.gates[j] = Math::limited_gate(activation, h.gates[j]), h.ups[j] = Math::factor(activation, h.ups[j]);
}

// Bits of the values that are above `limit`, or below -lowest.
MOE_INLINE uint32_t beyond(const Eight& values, float limit, float lowest) {
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) bits |= uint32_t(values[j] > limit || values[j] < -lowest) << j;
  return bits;
}

// Zeros where a bit is set.
MOE_INLINE void clear_values(RoundedEight& values, uint32_t bits) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (bits >> 2 * i & 1) values[i] &= 0xffff0000;
    if (bits >> (2 * i + 1) & 1) values[i] &= 0xffff;
  }
}

// How many of eight columns from `col` on are there, of `cols`.
MOE_INLINE int columns_left(int cols, int col) { return max(min(cols - col, 8), 0); }

// The first of eight columns of group 0 that a lane stores.
MOE_INLINE int lane_column() { return arch::lane_id() % 4 * 8; }

// Whether rows of this warp are among the tile's, where `row` is one of this lane.
MOE_INLINE bool any_row(const Tile& tile, int row) { return row - arch::lane_id() / 4 < tile.rows; }

template <class T, class Sums>
MOE_INLINE void store_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                           const float* bias) {
  const ChunkRows<T> out(p.out);
#pragma unroll
  for (int i = 0; i < Sums::kRows; ++i)
#pragma unroll
    for (int group = 0; group < Sums::kGroups; ++group) {
      const PairBiases biases(bias, group);
      RoundedEight words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = biases.add(j, sums.pair(i, group, j));
        words[j] = rounded_pair<T>(pair.x, pair.y);
      }
      exchange_pairs(words);
      const int row = row_begin + Sums::row(i), col = 32 * group + lane_column();
      if (row < tile.rows)
        out.store(out.at(tile.row_begin + row, tile.col_begin + col), words, columns_left(tile.cols, col));
    }
}

// Columns 32 group.. of the pre-activation, as take_gated and take give them.
template <class T>
MOE_INLINE void store_pre(const GroupedGemmParams& p, const ChunkRows<T>& pre, const GatesUps& h, int64_t row,
                          int64_t col_begin, int group, int cols) {
  const int col = 32 * group + lane_column();
  RoundedEight first, second;
  if (p.activation.gated && p.activation.interleaved) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      first[j] = rounded_pair<T>(h.gates[j], h.ups[j]);
      second[j] = rounded_pair<T>(h.gates[4 + j], h.ups[4 + j]);
    }
    exchange_pairs(first);
    exchange_pairs(second);
    const int at = 64 * group + lane_column();
    pre.store(pre.at(row, 2 * col_begin + at), first, columns_left(2 * cols, at));
    pre.store(pre.at(row, 2 * col_begin + at + 32), second, columns_left(2 * cols, at + 32));
  } else {
    first = rounded<T>(h.gates);
    exchange_pairs(first);
    pre.store(pre.at(row, col_begin + col), first, columns_left(cols, col));
    if (!p.activation.gated) return;
    second = rounded<T>(h.ups);
    exchange_pairs(second);
    pre.store(pre.at(row, p.n / 2 + col_begin + col), second, columns_left(cols, col));
  }
}

template <class T, class Sums>
MOE_INLINE void activate_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                              const float* bias) {
  const bool gated = p.activation.gated, interleaved = gated && p.activation.interleaved;
  const bool limited = limits(p.activation);
  using Math = ActivationMath<MathFor<T>>;
  const ChunkRows<T> out(p.out), pre(p.pre, gated ? p.n / 2 : p.n);
#pragma unroll 1
  for (int i = 0; i < Sums::kRows; ++i) {
    const int row = row_begin + Sums::row(i), cols = row < tile.rows ? tile.cols : 0;
    if (!any_row(tile, row)) break;
    T* const to = out.at(tile.row_begin + row, tile.col_begin + lane_column());
#pragma unroll 1
    for (int group = 0; group < (gated ? Sums::kGroups / 2 : Sums::kGroups); ++group) {
      GatesUps h;
      if (gated) h = take_gated(sums, i, group, interleaved, bias);
      else h.gates = h.ups = take(sums, i, group, bias);
      if (pre) store_pre(p, pre, h, tile.row_begin + row, tile.col_begin, group, cols);
      if (limited) limit_piece<Math>(p.activation, h);
      RoundedEight values;
      with_constants(p.activation, [&](const Activation& activation) {
        Eight a;
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = Math::forward(activation, h.gates[j], h.ups[j]);
        values = rounded<T>(a);
      });
      exchange_pairs(values);
      if (interleaved)  // a lane has got columns 0 4, 1 5, 2 6 and 3 7 of its eight
        values = {lower_halves(values[0], values[1]), lower_halves(values[2], values[3]),
                  upper_halves(values[0], values[1]), upper_halves(values[2], values[3])};
      out.store(to + 32 * group, values, columns_left(cols, 32 * group + lane_column()));
    }
  }
}

// What the backward epilogue reads of H for a warpgroup's rows, asked to be in L2 before the products are there.
template <class T>
MOE_INLINE void ask_for_pre(const GroupedGemmParams& p, const Tile& tile, int row_begin, int rows) {
  if (p.epilogue != Epilogue::activate_backward) return;
  const bool gated = p.activation.gated, interleaved = gated && p.activation.interleaved;
  const uint32_t bytes = uint32_t(tile.cols) * sizeof(T) / 16 * 16;
#pragma unroll 1
  for (int i = int(threadIdx.x) % 128; i < (gated ? 2 : 1) * rows; i += 128) {
    const int row = row_begin + i % rows, run = i / rows;
    if (row >= tile.rows) continue;
    const int64_t col = interleaved ? 2 * tile.col_begin + run * tile.cols : run * p.n + tile.col_begin;
    const T* const from = static_cast<const T*>(p.pre.data) + (tile.row_begin + row) * p.pre.stride + col;
    if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) arch::prefetch_l2(from, bytes);
  }
}

// Gates and ups of eight inner columns, or their gradients: where they lie interleaved, two runs of four of each.
struct GateUpWords {
  RoundedEight gates, ups;

  MOE_INLINE GateUpWords unzipped() const {
    const RoundedEight &a = gates, &b = ups;
    return {{lower_halves(a[0], a[1]), lower_halves(a[2], a[3]), lower_halves(b[0], b[1]), lower_halves(b[2], b[3])},
            {upper_halves(a[0], a[1]), upper_halves(a[2], a[3]), upper_halves(b[0], b[1]), upper_halves(b[2], b[3])}};
  }
  MOE_INLINE GateUpWords zipped() const {
    GateUpWords out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      RoundedEight& run = i < 2 ? out.gates : out.ups;
      run[i % 2 * 2] = lower_halves(gates[i], ups[i]), run[i % 2 * 2 + 1] = upper_halves(gates[i], ups[i]);
    }
    return out;
  }
};

// The rows of such, as they lie in memory: all gates before all ups, or side by side.
template <class T>
class GateUpRows {
 public:
  MOE_INLINE GateUpRows(const Matrix& matrix, const Activation& activation, int64_t inner)
      : rows_(matrix, inner), gated_(activation.gated), interleaved_(activation.gated && activation.interleaved) {
    to_second_ = interleaved_ ? 8 : inner;
  }

  // n of the eight columns are there; the others, and the ups of what has none, are zeros.
  MOE_INLINE GateUpWords load(const T* from, int n) const {
    GateUpWords out{};
    if (n == 0) return out;
    out.gates = rows_.load(from, first_count(n));
    if (gated_) out.ups = rows_.load(from + to_second_, second_count(n));
    return out;
  }

  MOE_INLINE void store(T* to, const GateUpWords& h, int n) const {
    rows_.store(to, h.gates, first_count(n));
    if (gated_) rows_.store(to + to_second_, h.ups, second_count(n));
  }

  // col: of the inner columns.
  MOE_INLINE T* at(int64_t row, int64_t col) const { return rows_.at(row, interleaved_ ? 2 * col : col); }

 private:
  MOE_INLINE int first_count(int n) const { return interleaved_ ? min(2 * n, 8) : n; }
  MOE_INLINE int second_count(int n) const { return interleaved_ ? max(2 * n - 8, 0) : n; }

  ChunkRows<T> rows_;
  int64_t to_second_;
  bool gated_, interleaved_;
};

// The products are dA' [rows, inner columns], before the route weight s: dH = s * dA' * act'(H), out = s * A.
// parts [rows of the problem, tiles of columns]: this tile's part of <dA', A>, or null.
template <class T, class Sums>
MOE_INLINE void activate_backward_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                                       const float* bias, float* parts, int col_tiles) {
  const bool limited = limits(p.activation), interleaved = p.activation.gated && p.activation.interleaved;
  using Math = ActivationMath<MathFor<T>>;
  const float limit = float(p.activation.limit);
  const ChunkRows<T> out(p.out);
  const GateUpRows<T> pre(p.pre, p.activation, p.n), grad_pre(p.grad_pre, p.activation, p.n);
#pragma unroll 1
  for (int i = 0; i < Sums::kRows; ++i) {
    const int row = row_begin + Sums::row(i);
    if (!any_row(tile, row)) break;
    const bool there = row < tile.rows;
    const int64_t of_row = tile.row_begin + row, of_col = tile.col_begin + lane_column();
    const auto count = [&](int group) { return there ? columns_left(tile.cols, 32 * group + lane_column()) : 0; };
    const float score = p.score.data && there ? read(p.score, slot_of(p.a, of_row)) : 1;
    GateUpWords words = pre.load(pre.at(of_row, of_col), count(0));
    float share = 0;
#pragma unroll 1
    for (int group = 0; group < Sums::kGroups; ++group) {
      const int64_t col = of_col + 32 * group;
      const int n = count(group);
      if (interleaved) words = words.unzipped();
      uint32_t cut_gates = 0, cut_ups = 0;
      if (limited) {
        cut_gates = beyond(widened<T>(words.gates), limit, HUGE_VALF);
        cut_ups = beyond(widened<T>(words.ups), limit, limit);
      }
      Eight grad = take(sums, i, group, bias);
      exchange_pairs(grad);
      if (n < 8) {
#pragma unroll
        for (int j = 0; j < 8; ++j) grad[j] = j < n ? grad[j] : 0;  // others are not to be added
      }
      GatesUps h{widened<T>(words.gates), widened<T>(words.ups)};
      if (limited) limit_piece<Math>(p.activation, h);
      RoundedEight values;
      GateUpWords grad_h;
      with_constants(p.activation, [&](const Activation& activation) {
        Eight scaled, grad_gates, grad_ups;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const auto d = Math::backward(activation, h.gates[j], h.ups[j], score * grad[j]);
          scaled[j] = score * d.value, grad_gates[j] = d.gate, grad_ups[j] = d.up;
          share += grad[j] * d.value;
        }
        values = rounded<T>(scaled);
        grad_h = {rounded<T>(grad_gates), rounded<T>(grad_ups)};
      });
      if (group + 1 < Sums::kGroups) words = pre.load(pre.at(of_row, col + 32), count(group + 1));
      if (cut_gates | cut_ups) clear_values(grad_h.gates, cut_gates), clear_values(grad_h.ups, cut_ups);
      if (interleaved) grad_h = grad_h.zipped();
      if (n > 0) {
        out.store(out.at(of_row, col), values, n);
        grad_pre.store(grad_pre.at(of_row, col), grad_h, n);
      }
    }
    if (parts) {
      share += arch::shuffle_xor(share, 1);
      share += arch::shuffle_xor(share, 2);
      if (there && arch::lane_id() % 4 == 0) parts[of_row * col_tiles + tile.col_begin / Sums::kCols] = share;
    }
  }
}

// bias [cols of the products]
template <class T, class Sums>
MOE_INLINE void finish_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                            const float* bias, float* parts, int col_tiles) {
  bias += arch::lane_id() % 4 * 2;
  switch (p.epilogue) {
    case Epilogue::store: return store_sums<T>(p, tile, row_begin, sums, bias);
    case Epilogue::activate: return activate_sums<T>(p, tile, row_begin, sums, bias);
    case Epilogue::activate_backward:
      return activate_backward_sums<T>(p, tile, row_begin, sums, bias, parts, col_tiles);
  }
}

}  // namespace moe
