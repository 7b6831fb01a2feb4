// What a warpgroup on sm_90a does with its sums before they are stored, straight from registers. wgmma leaves two
// neighbouring columns of a row to a lane; the four lanes of a row exchange them, so that each has eight and loads and
// stores 16 bytes. Where the activation is gated, gates stand in the first half of a tile's columns and the ups of the
// same inner columns in the second, or, interleaved, side by side.
#pragma once

#include "cuda/arch/tma.cuh"
#include "cuda/arch/wgmma.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/values.cuh"
#include "cuda/kernels/warp.cuh"

namespace moe {

using Eight = arch::Pack<float, 8>;

// Rows of a matrix, read and written in chunks of n columns, of which `count` are there.
template <class T>
class ChunkRows {
 public:
  // `offset`: where a second run of columns begins.
  MOE_INLINE ChunkRows(const Matrix& matrix, int64_t offset = 0)
      : data_(static_cast<T*>(matrix.data)),
        stride_(matrix.stride),
        aligned_(reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && (matrix.stride | offset) % 8 == 0) {}

  MOE_INLINE explicit operator bool() const { return data_ != nullptr; }

  MOE_INLINE arch::Pack<T, 8> load(int64_t row, int64_t col, int count) const {
    return load_values<T, 8>(data_ + row * stride_ + col, count, aligned_);
  }

  template <int n>
  MOE_INLINE void store(int64_t row, int64_t col, const arch::Pack<T, n>& values, int count) const {
    T* const to = data_ + row * stride_ + col;
    if (aligned_ && count >= n) return arch::store_global(to, values);
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < count) to[i] = values[i];
  }

  template <int n>
  MOE_INLINE void store(int64_t row, int64_t col, const arch::Pack<float, n>& values, int count) const {
    arch::Pack<T, n> rounded;
#pragma unroll
    for (int i = 0; i < n; ++i) rounded[i] = from_float<T>(values[i]);
    store(row, col, rounded, count);
  }

 private:
  T* data_;
  int64_t stride_;
  bool aligned_;
};

// Of the four lanes of a row: pair i of lane q goes to pair q of lane i.
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

// Where a lane stands: a row of the tile, and the first of eight columns of the products [rows, cols].
struct Place {
  int row, col;
};

// The sums [64 * kBlocks, cols] of a warpgroup, as wgmma leaves them.
template <int blocks, int cols>
struct WarpgroupSums {
  static constexpr int kBlocks = blocks, kCols = cols;
  static constexpr int kPiecesOfRow = cols / 32, kPieces = 2 * blocks * kPiecesOfRow;

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

  // Where this lane stands in a piece of 32 columns. Pieces of the same row follow each other, and a piece of the
  // second half of the columns the one of the first that it belongs to. row_begin: the warpgroup's first row.
  static MOE_INLINE Place place(int piece, int row_begin) {
    const int row = piece / kPiecesOfRow, col = piece % 2 * (cols / 2) + piece % kPiecesOfRow / 2 * 32;
    return {row_begin + row / 2 * 64 + row % 2 * 8 + int(threadIdx.x) % 128 / 32 * 16 + arch::lane_id() / 4,
            col + arch::lane_id() % 4 * 8};
  }

  // The lane's eight sums of a piece, with biases [cols] added. The pieces are told apart at run time, so that an
  // epilogue is compiled once: by branches, as selecting from all of them would cost more than the rest of it.
  MOE_INLINE Eight take(int piece, const float* bias) const {
    Eight out = branch_to(piece);
    exchange_pairs(out);
    const int col = place(piece, 0).col;
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] += bias[col + j];
    return out;
  }

  // The same, rounded before the lanes exchange them: half as much is. For pieces known at compile time.
  template <class T>
  MOE_INLINE arch::Pack<T, 8> take_rounded(int piece, const float* bias) const {
    const Eight sums = as_they_lie(piece);
    const float* const own = bias + place(piece, 0).col - arch::lane_id() % 4 * 6;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto add = arch::load<arch::Pack<float, 2>>(own + 8 * i);
      const arch::Pack<T, 2> pair{from_float<T>(sums[2 * i] + add[0]), from_float<T>(sums[2 * i + 1] + add[1])};
      __builtin_memcpy(&words[i], &pair, 4);
    }
    transpose_quad(words);
    arch::Pack<T, 8> out;
    __builtin_memcpy(&out, words, 16);
    return out;
  }

 private:
  MOE_INLINE Eight as_they_lie(int piece) const {
    const int row = piece / kPiecesOfRow, group = piece % 2 * (cols / 16) + piece % kPiecesOfRow / 2 * 4;
    Eight out;
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] = values[row / 2][4 * (group + j / 2) + row % 2 * 2 + j % 2];
    return out;
  }

  MOE_INLINE Eight branch_to(int piece) const {
    static_assert(kPieces == 16);
    switch (piece) {
      case 0: return as_they_lie(0);
      case 1: return as_they_lie(1);
      case 2: return as_they_lie(2);
      case 3: return as_they_lie(3);
      case 4: return as_they_lie(4);
      case 5: return as_they_lie(5);
      case 6: return as_they_lie(6);
      case 7: return as_they_lie(7);
      case 8: return as_they_lie(8);
      case 9: return as_they_lie(9);
      case 10: return as_they_lie(10);
      case 11: return as_they_lie(11);
      case 12: return as_they_lie(12);
      case 13: return as_they_lie(13);
      case 14: return as_they_lie(14);
      default: return as_they_lie(15);
    }
  }
};

// How many of n columns from `col` on are there.
template <int n>
MOE_INLINE int columns_left(const Tile& tile, int col) {
  return max(min(tile.cols - col, n), 0);
}

template <class T, class Sums>
MOE_INLINE void store_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                           const float* bias) {
  const ChunkRows<T> out(p.out);
#pragma unroll
  for (int piece = 0; piece < Sums::kPieces; ++piece) {
    const Place at = Sums::place(piece, row_begin);
    const auto values = sums.template take_rounded<T>(piece, bias);
    if (at.row < tile.rows)
      out.store(tile.row_begin + at.row, tile.col_begin + at.col, values, columns_left<8>(tile, at.col));
  }
}

MOE_INLINE Eight activated(const Activation& activation, const Eight& gate, const Eight& up) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = ActivationMath<FloatMath>::forward(activation, gate[i], up[i]);
  return out;
}

// Four of the gates (which: 0) or ups (1) of eight interleaved columns each.
MOE_INLINE Eight every_other(const Eight& first, const Eight& second, int which) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = first[2 * i + which], out[4 + i] = second[2 * i + which];
  return out;
}

MOE_INLINE arch::Pack<float, 4> half_of(const Eight& values, int which) {
  arch::Pack<float, 4> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = values[4 * which + i];
  return out;
}

template <class T, class Sums>
MOE_INLINE void activate_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                              const float* bias) {
  const Activation& activation = p.activation;
  const int64_t inner = activation.gated ? p.n / 2 : p.n;
  const ChunkRows<T> out(p.out), pre(p.pre, inner);
#pragma unroll 1
  for (int piece = 0; piece < Sums::kPieces; piece += activation.gated ? 2 : 1) {
    const Place at = Sums::place(piece, row_begin);
    const Eight first = sums.take(piece, bias), second = activation.gated ? sums.take(piece + 1, bias) : first;
    if (at.row >= tile.rows) continue;
    const int64_t row = tile.row_begin + at.row, col = tile.col_begin + at.col;
    if (activation.gated && activation.interleaved) {
      constexpr int half = Sums::kCols / 2;
      const int n = columns_left<4>(tile, at.col / 2), m = columns_left<4>(tile, (at.col + half) / 2);
      const int64_t begin = tile.col_begin + at.col / 2;
      if (pre) {
        pre.store(row, 2 * begin, first, 2 * n);
        pre.store(row, 2 * begin + half, second, 2 * m);
      }
      const Eight a = activated(activation, every_other(first, second, 0), every_other(first, second, 1));
      out.store(row, begin, half_of(a, 0), n);
      out.store(row, begin + half / 2, half_of(a, 1), m);
    } else {
      const int n = columns_left<8>(tile, at.col);
      if (pre) {
        pre.store(row, col, first, n);
        if (activation.gated) pre.store(row, inner + col, second, n);
      }
      out.store(row, col, activated(activation, first, second), n);
    }
  }
}

// Gates and ups of eight inner columns, or their gradients, as they lie: two runs of eight.
template <class T>
struct GateUpChunks {
  arch::Pack<T, 8> first, second;

  MOE_INLINE T& gate(int i, bool interleaved) {
    return !interleaved ? first[i] : i < 4 ? first[2 * i] : second[2 * i - 8];
  }
  MOE_INLINE T& up(int i, bool interleaved) {
    return !interleaved ? second[i] : i < 4 ? first[2 * i + 1] : second[2 * i - 7];
  }
};

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

// The products are dA' [rows, inner columns], before the route weight s: dH = s * dA' * act'(H), out = s * A.
// parts [rows of the problem, tiles of columns]: this tile's part of <dA', A>, or null. H is read a piece ahead.
template <class T, class Sums>
MOE_INLINE void activate_backward_sums(const GroupedGemmParams& p, const Tile& tile, int row_begin, const Sums& sums,
                                       const float* bias, float* parts, int col_tiles) {
  const Activation& activation = p.activation;
  const bool gated = activation.gated, interleaved = gated && activation.interleaved;
  const ChunkRows<T> out(p.out), pre(p.pre, p.n), grad_pre(p.grad_pre, p.n);
  const auto counts = [&](int n) { return interleaved ? min(2 * n, 8) : n; };
  const auto more = [&](int n) { return !gated ? 0 : interleaved ? max(2 * n - 8, 0) : n; };
  const auto column = [&](int64_t i) { return interleaved ? 2 * i : i; };
  const auto second_column = [&](int64_t i) { return interleaved ? 2 * i + 8 : p.n + i; };
  const auto read_pre = [&](int piece, GateUpChunks<T>& to) {
    const Place at = Sums::place(piece, row_begin);
    const int n = columns_left<8>(tile, at.col);
    const int64_t row = tile.row_begin + at.row, i = tile.col_begin + at.col;
    if (piece >= Sums::kPieces || at.row >= tile.rows || n == 0) return;
    to.first = pre.load(row, column(i), counts(n));
    if (gated) to.second = pre.load(row, second_column(i), more(n));
  };

  GateUpChunks<T> next{};
  read_pre(0, next);
  float share = 0, score = 1;
#pragma unroll 1
  for (int piece = 0; piece < Sums::kPieces; ++piece) {
    GateUpChunks<T> h = next;
    read_pre(piece + 1, next);
    const Place at = Sums::place(piece, row_begin);
    const int64_t row = tile.row_begin + at.row, i = tile.col_begin + at.col;
    const bool there = at.row < tile.rows;
    const int n = there ? columns_left<8>(tile, at.col) : 0;
    const Eight grad = sums.take(piece, bias);
    if (piece % Sums::kPiecesOfRow == 0) {
      share = 0;
      score = p.score.data && there ? read(p.score, slot_of(p.a, row)) : 1;
    }
    arch::Pack<T, 8> values, grad_gate, grad_up;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float gate = to_float(h.gate(j, interleaved)), up = to_float(h.up(j, interleaved));
      const auto d = ActivationMath<FloatMath>::backward(activation, gate, up, score * grad[j]);
      values[j] = from_float<T>(score * d.value);
      grad_gate[j] = from_float<T>(d.gate), grad_up[j] = from_float<T>(d.up);
      share += j < n ? grad[j] * d.value : 0;
    }
    if (n > 0) {
      GateUpChunks<T> grad_h{grad_gate, grad_up};
      if (interleaved) {
#pragma unroll
        for (int j = 0; j < 8; ++j) grad_h.gate(j, true) = grad_gate[j], grad_h.up(j, true) = grad_up[j];
      }
      out.store(row, i, values, n);
      grad_pre.store(row, column(i), grad_h.first, counts(n));
      if (gated) grad_pre.store(row, second_column(i), grad_h.second, more(n));
    }
    if (parts && (piece + 1) % Sums::kPiecesOfRow == 0) {
      share += arch::shuffle_xor(share, 1);
      share += arch::shuffle_xor(share, 2);
      if (there && arch::lane_id() % 4 == 0) parts[row * col_tiles + tile.col_begin / Sums::kCols] = share;
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
