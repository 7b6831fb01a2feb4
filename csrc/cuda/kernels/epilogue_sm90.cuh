// What a warpgroup on sm_90a does with its sums before they are stored, straight from registers. wgmma leaves two
// neighbouring columns of a row to a lane; the four lanes of a row exchange them, so that each has eight and loads and
// stores 16 bytes. Where the activation is gated, gates stand in the first half of a tile's columns and the ups of the
// same inner columns in the second, or, interleaved, side by side. Results have 16 bits.
#pragma once

#include <type_traits>

#include "cuda/arch/tma.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/values.cuh"
#include "cuda/kernels/warp.cuh"

namespace moe {

using Eight = arch::Pack<float, 8>;
using Words = arch::Pack<uint32_t, 4>;  // eight values of two bytes

template <class T>
MOE_INLINE uint32_t rounded_pair(float low, float high) {
  return bits_as<uint32_t>(arch::Pack<T, 2>{from_float<T>(low), from_float<T>(high)});
}

template <class T>
MOE_INLINE Words rounded(const Eight& values) {
  Words out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = rounded_pair<T>(values[2 * i], values[2 * i + 1]);
  return out;
}

template <class T>
MOE_INLINE Eight widened(const Words& words) {
  const auto values = bits_as<arch::Pack<T, 8>>(words);
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = to_float(values[i]);
  return out;
}

MOE_INLINE uint32_t lower_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
MOE_INLINE uint32_t upper_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

// Rows of a matrix, read and written in chunks of eight columns, of which n are there.
template <class T>
class ChunkRows {
 public:
  // `offset`: where a second run of columns begins.
  MOE_INLINE ChunkRows(const Matrix& matrix, int64_t offset = 0)
      : data_(static_cast<T*>(matrix.data)),
        stride_(matrix.stride),
        aligned_(reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && (matrix.stride | offset) % 8 == 0) {}

  MOE_INLINE explicit operator bool() const { return data_ != nullptr; }

  MOE_INLINE Words load(int64_t row, int64_t col, int n) const {
    return bits_as<Words>(load_values<T, 8>(data_ + row * stride_ + col, n, aligned_));
  }

  MOE_INLINE void store(int64_t row, int64_t col, const Words& words, int n) const {
    T* const to = data_ + row * stride_ + col;
    if (aligned_ && n >= 8) return arch::store_global(to, words);
    const auto values = bits_as<arch::Pack<T, 8>>(words);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < n) to[i] = values[i];
  }

 private:
  T* data_;
  int64_t stride_;
  bool aligned_;
};

// Of the four lanes of a row: pair i of lane q goes to pair q of lane i.
MOE_INLINE void exchange_pairs(Words& pairs) { transpose_quad(pairs.values); }
MOE_INLINE void exchange_pairs(Eight& pairs) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float of_pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_pairs[i] = pairs[2 * i + j];
    transpose_quad(of_pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[2 * i + j] = of_pairs[i];
  }
}

// The sums [64 * kBlocks, cols] of a warpgroup, as wgmma leaves them: a lane has two rows of each block, eight apart,
// and of groups of 32 columns four pairs of neighbours.
template <int blocks, int cols>
struct WarpgroupSums {
  static constexpr int kBlocks = blocks, kCols = cols, kRows = 2 * blocks, kGroups = cols / 32;

  float values[blocks][cols / 2];

  MOE_INLINE void clear() {
#pragma unroll
    for (int i = 0; i < blocks; ++i)
#pragma unroll
      for (int j = 0; j < cols / 2; ++j) values[i][j] = 0;
  }

  MOE_INLINE void hold() {
#pragma unroll
    for (int i = 0; i < blocks; ++i) arch::wgmma_hold(values[i]);
  }

  // The lane's rows, among those of the warpgroup.
  static MOE_INLINE int row(int i) {
    return i / 2 * 64 + i % 2 * 8 + int(threadIdx.x) % 128 / 32 * 16 + arch::lane_id() / 4;
  }

  // Of row i: columns 8 j + 2 q and the next of a group, q being the lane's place among the four of a row.
  MOE_INLINE float2 pair(int i, int group, int j) const {
    const int at = 4 * (group * 4 + j) + i % 2 * 2;
    return {values[i / 2][at], values[i / 2][at + 1]};
  }
};

// f(std::integral_constant<int, index>), begin <= index < end, by branches, so that what uses the result is compiled
// once: registers have no run-time index, and to select from all of them would cost more than the rest of an epilogue.
template <int begin, int end, class F>
MOE_INLINE void with_index(int index, const F& f) {
  constexpr int middle = (begin + end) / 2;
  if constexpr (begin == middle) f(std::integral_constant<int, begin>());
  else if (index < middle) with_index<begin, middle>(index, f);
  else with_index<middle, end>(index, f);
}

// The biases of a group's pairs, added as sums are taken.
struct PairBiases {
  float2 pairs[4];

  MOE_INLINE PairBiases(const float* bias, int group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = arch::load<float2>(bias + 32 * group + 8 * i + arch::lane_id() % 4 * 2);
  }

  MOE_INLINE float2 add(int i, float2 pair) const { return {pair.x + pairs[i].x, pair.y + pairs[i].y}; }
};

// Eight sums of a lane as they lie, biases added.
template <class Sums>
MOE_INLINE Eight take(const Sums& sums, int row, int group, const float* bias) {
  const PairBiases biases(bias, group);
  Eight out;
  with_index<0, Sums::kRows * Sums::kGroups>(row * Sums::kGroups + group, [&](auto index) {
    constexpr int row = decltype(index)::value / Sums::kGroups, group = decltype(index)::value % Sums::kGroups;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = biases.add(j, sums.pair(row, group, j));
      out[2 * j] = pair.x, out[2 * j + 1] = pair.y;
    }
  });
  return out;
}

// Gates and ups of eight inner columns: pair i of one group and of another, or, interleaved, pairs of two groups side
// by side.
struct GatesUps {
  Eight gates, ups;
};

template <class Sums>
MOE_INLINE GatesUps take_gated(const Sums& sums, int row, int group, bool interleaved, const float* bias) {
  constexpr int groups = Sums::kGroups / 2, count = Sums::kRows * groups;
  const PairBiases first_biases(bias, interleaved ? 2 * group : group);
  const PairBiases second_biases(bias, interleaved ? 2 * group + 1 : groups + group);
  GatesUps out;
  with_index<0, 2 * count>((interleaved ? count : 0) + row * groups + group, [&](auto index) {
    constexpr int i = decltype(index)::value % count, row = i / groups, group = i % groups;
    constexpr bool mixed = decltype(index)::value >= count;
    constexpr int first = mixed ? 2 * group : group, second = mixed ? 2 * group + 1 : groups + group;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 a = first_biases.add(j, sums.pair(row, first, j));
      const float2 b = second_biases.add(j, sums.pair(row, second, j));
      if constexpr (mixed) {
        out.gates[j] = a.x, out.ups[j] = a.y, out.gates[4 + j] = b.x, out.ups[4 + j] = b.y;
      } else {
        out.gates[2 * j] = a.x, out.gates[2 * j + 1] = a.y, out.ups[2 * j] = b.x, out.ups[2 * j + 1] = b.y;
      }
    }
  });
  return out;
}

// Whether there is neither a limit nor an alpha nor an offset, which cost instructions.
MOE_INLINE bool is_usual(const Activation& activation) {
  return activation.limit == HUGE_VAL && activation.up_offset == 0 && activation.alpha == 1;
}

// f(activation) with the activation's choices as constants of the code, so that a piece takes one branch and nothing of
// what was not chosen.
template <class F>
MOE_INLINE void with_constants(const Activation& activation, bool usual, const F& f) {
  const auto choose = [&](Act act) {
    Activation chosen = activation;
    chosen.act = act;
    if (!usual) return f(chosen);
    chosen.alpha = 1, chosen.limit = HUGE_VAL, chosen.up_offset = -0.0;  // which leaves even -0 as it is
    if (activation.gated) chosen.gated = true, f(chosen);
    else chosen.gated = false, f(chosen);
  };
  switch (activation.act) {
    case Act::silu: return choose(Act::silu);
    case Act::gelu: return choose(Act::gelu);
    case Act::gelu_tanh: return choose(Act::gelu_tanh);
    case Act::relu: return choose(Act::relu);
    case Act::relu2: return choose(Act::relu2);
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
      Words words;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = biases.add(j, sums.pair(i, group, j));
        words[j] = rounded_pair<T>(pair.x, pair.y);
      }
      exchange_pairs(words);
      const int row = row_begin + Sums::row(i), col = 32 * group + lane_column();
      if (row < tile.rows) out.store(tile.row_begin + row, tile.col_begin + col, words, columns_left(tile.cols, col));
    }
}

// Columns 32 group.. of the pre-activation, as take_gated and take give them.
template <class T>
MOE_INLINE void store_pre(const GroupedGemmParams& p, const ChunkRows<T>& pre, const GatesUps& h, int64_t row,
                          int64_t col_begin, int group, int cols) {
  const int col = 32 * group + lane_column();
  Words first, second;
  if (p.activation.gated && p.activation.interleaved) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      first[j] = rounded_pair<T>(h.gates[j], h.ups[j]);
      second[j] = rounded_pair<T>(h.gates[4 + j], h.ups[4 + j]);
    }
    exchange_pairs(first);
    exchange_pairs(second);
    const int at = 64 * group + lane_column();
    pre.store(row, 2 * col_begin + at, first, columns_left(2 * cols, at));
    pre.store(row, 2 * col_begin + at + 32, second, columns_left(2 * cols, at + 32));
  } else {
    first = rounded<T>(h.gates);
    exchange_pairs(first);
    pre.store(row, col_begin + col, first, columns_left(cols, col));
    if (!p.activation.gated) return;
    second = rounded<T>(h.ups);
    exchange_pairs(second);
    pre.store(row, p.n / 2 + col_begin + col, second, columns_left(cols, col));
  }
}

template <class T, class Sums>
MOE_INLINE void activate_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                              const float* bias) {
  const bool gated = p.activation.gated, interleaved = gated && p.activation.interleaved;
  const bool usual = is_usual(p.activation);
  const ChunkRows<T> out(p.out), pre(p.pre, gated ? p.n / 2 : p.n);
#pragma unroll 1
  for (int i = 0; i < Sums::kRows; ++i) {
    const int row = row_begin + Sums::row(i), cols = row < tile.rows ? tile.cols : 0;
    if (!any_row(tile, row)) break;
#pragma unroll 1
    for (int group = 0; group < (gated ? Sums::kGroups / 2 : Sums::kGroups); ++group) {
      GatesUps h;
      if (gated) h = take_gated(sums, i, group, interleaved, bias);
      else h.gates = take(sums, i, group, bias);
      if (pre) store_pre(p, pre, h, tile.row_begin + row, tile.col_begin, group, cols);
      Words values;
      with_constants(p.activation, usual, [&](const Activation& activation) {
        Eight a;
#pragma unroll
        for (int j = 0; j < 8; ++j) a[j] = ActivationMath<MathFor<T>>::forward(activation, h.gates[j], h.ups[j]);
        values = rounded<T>(a);
      });
      exchange_pairs(values);
      if (interleaved)  // a lane has got columns 0 4, 1 5, 2 6 and 3 7 of its eight
        values = {lower_halves(values[0], values[1]), lower_halves(values[2], values[3]),
                  upper_halves(values[0], values[1]), upper_halves(values[2], values[3])};
      const int col = 32 * group + lane_column();
      out.store(tile.row_begin + row, tile.col_begin + col, values, columns_left(cols, col));
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

// Gates and ups of eight inner columns, or their gradients: where they are interleaved, two runs of four of each.
struct GateUpWords {
  Words gates, ups;

  MOE_INLINE GateUpWords unzipped() const {
    const Words &a = gates, &b = ups;
    return {{lower_halves(a[0], a[1]), lower_halves(a[2], a[3]), lower_halves(b[0], b[1]), lower_halves(b[2], b[3])},
            {upper_halves(a[0], a[1]), upper_halves(a[2], a[3]), upper_halves(b[0], b[1]), upper_halves(b[2], b[3])}};
  }
  MOE_INLINE GateUpWords zipped() const {
    GateUpWords out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Words& run = i < 2 ? out.gates : out.ups;
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
      : rows_(matrix, inner),
        inner_(inner),
        gated_(activation.gated),
        interleaved_(activation.gated && activation.interleaved) {}

  // n of the eight columns are there; the others, and the ups of what has none, are zeros.
  MOE_INLINE GateUpWords load(int64_t row, int64_t col, int n) const {
    GateUpWords out{};
    if (n == 0) return out;
    out.gates = rows_.load(row, first(col), first_count(n));
    if (gated_) out.ups = rows_.load(row, second(col), second_count(n));
    return out;
  }

  MOE_INLINE void store(int64_t row, int64_t col, const GateUpWords& h, int n) const {
    rows_.store(row, first(col), h.gates, first_count(n));
    if (gated_) rows_.store(row, second(col), h.ups, second_count(n));
  }

 private:
  MOE_INLINE int64_t first(int64_t col) const { return interleaved_ ? 2 * col : col; }
  MOE_INLINE int64_t second(int64_t col) const { return interleaved_ ? 2 * col + 8 : inner_ + col; }
  MOE_INLINE int first_count(int n) const { return interleaved_ ? min(2 * n, 8) : n; }
  MOE_INLINE int second_count(int n) const { return interleaved_ ? max(2 * n - 8, 0) : n; }

  ChunkRows<T> rows_;
  int64_t inner_;
  bool gated_, interleaved_;
};

// The products are dA' [rows, inner columns], before the route weight s: dH = s * dA' * act'(H), out = s * A.
// parts [rows of the problem, tiles of columns]: this tile's part of <dA', A>, or null. H is read a group ahead.
template <class T, class Sums>
MOE_INLINE void activate_backward_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                                       const float* bias, float* parts, int col_tiles) {
  const bool usual = is_usual(p.activation), interleaved = p.activation.gated && p.activation.interleaved;
  const ChunkRows<T> out(p.out);
  const GateUpRows<T> pre(p.pre, p.activation, p.n), grad_pre(p.grad_pre, p.activation, p.n);
#pragma unroll 1
  for (int i = 0; i < Sums::kRows; ++i) {
    const int row = row_begin + Sums::row(i);
    if (!any_row(tile, row)) break;
    const bool there = row < tile.rows;
    const int64_t of_row = tile.row_begin + row, of_out = tile.col_begin + lane_column();
    const auto count = [&](int group) { return there ? columns_left(tile.cols, 32 * group + lane_column()) : 0; };
    const float score = p.score.data && there ? read(p.score, slot_of(p.a, of_row)) : 1;
    auto next = pre.load(of_row, of_out, count(0));
    float share = 0;
#pragma unroll 1
    for (int group = 0; group < Sums::kGroups; ++group) {
      const int64_t col = of_out + 32 * group;
      const int n = count(group);
      const GateUpWords h = interleaved ? next.unzipped() : next;
      if (group + 1 < Sums::kGroups) next = pre.load(of_row, col + 32, count(group + 1));
      Eight grad = take(sums, i, group, bias);
      exchange_pairs(grad);
      if (n < 8) {
#pragma unroll
        for (int j = 0; j < 8; ++j) grad[j] = j < n ? grad[j] : 0;  // others are not to be added
      }
      Words values;
      GateUpWords grad_h;
      with_constants(p.activation, usual, [&](const Activation& activation) {
        const Eight gate = widened<T>(h.gates), up = widened<T>(h.ups);
        Eight scaled, grad_gates, grad_ups;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const auto d = ActivationMath<MathFor<T>>::backward(activation, gate[j], up[j], score * grad[j]);
          scaled[j] = score * d.value, grad_gates[j] = d.gate, grad_ups[j] = d.up;
          share += grad[j] * d.value;
        }
        values = rounded<T>(scaled);
        grad_h = {rounded<T>(grad_gates), rounded<T>(grad_ups)};
      });
      if (interleaved) grad_h = grad_h.zipped();
      if (n > 0) {
        out.store(of_row, col, values, n);
        grad_pre.store(of_row, col, grad_h, n);
      }
    }
    if (parts) {
      share += arch::shuffle_xor(share, 1);
      share += arch::shuffle_xor(share, 2);
      if (there && arch::lane_id() % 4 == 0) parts[of_row * col_tiles + tile.col_begin / Sums::kCols] = share;
    }
  }
}

template <class T, class Sums>
MOE_INLINE void finish_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                            const float* bias, float* parts, int col_tiles) {
  switch (p.epilogue) {
    case Epilogue::store: return store_sums<T>(p, tile, row_begin, sums, bias);
    case Epilogue::activate: return activate_sums<T>(p, tile, row_begin, sums, bias);
    case Epilogue::activate_backward:
      return activate_backward_sums<T>(p, tile, row_begin, sums, bias, parts, col_tiles);
  }
}

}  // namespace moe
