// Vectors rearranged in registers: square blocks transposed, pairs interleaved, parted or joined.
#pragma once

#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

// The even (odd = 0) or odd units of a, then those of b. Units are values within each 16 bytes of a register, or those
// 16 bytes within the register: what one shuffle instruction does without an index register.
template <class E, bool within>
constexpr int unzipped(int lane, int odd) {
  constexpr int n = kLanes<E>, unit = 16 / int(sizeof(E)), length = within ? unit : n / unit;
  const int at = within ? lane % unit : lane / unit;
  const int source = at < length / 2 ? 2 * at + odd : 2 * (at - length / 2) + odd;
  const int from_b = at < length / 2 ? 0 : n;
  return from_b + (within ? lane / unit * unit + source : source * unit + lane % unit);
}

template <class E, bool within, int... lane>
MOE_INLINE void unzip(Vec<E>& a, Vec<E>& b, std::integer_sequence<int, lane...>) {
  using Float = std::conditional_t<sizeof(E) == 4, float, double>;  // integers have no shuffle of two registers
  const auto x = bit_cast<Vec<Float>>(a), y = bit_cast<Vec<Float>>(b);
  a = bit_cast<Vec<E>>(__builtin_shufflevector(x, y, (unzipped<E, within>(lane, 0))...));
  b = bit_cast<Vec<E>>(__builtin_shufflevector(x, y, (unzipped<E, within>(lane, 1))...));
}

// Every second value of a, then of b, from the first or (odd = 1) the second on.
template <class C, int odd, int... lane>
MOE_INLINE Vec<C> every_second(Vec<C> a, Vec<C> b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + odd)...);
}

// Values of a and b in turn: of the first (half = 0) or the second half of their lanes.
template <class C, int half, int... lane>
MOE_INLINE Vec<C> alternating(Vec<C> a, Vec<C> b, std::integer_sequence<int, lane...>) {
  constexpr int n = kLanes<C>;
  return __builtin_shufflevector(a, b, (half * n / 2 + lane / 2 + lane % 2 * n)...);
}

// Two rows of 16-bit values side by side, their columns in order: the first half of them, and the second.
template <int... lane>
MOE_INLINE void interleave(Vec<uint16_t> a, Vec<uint16_t> b, Vec<uint32_t>* to, std::integer_sequence<int, lane...>) {
  constexpr std::integer_sequence<int, lane...> each;
  to[0] = bit_cast<Vec<uint32_t>>(alternating<uint16_t, 0>(a, b, each));
  to[1] = bit_cast<Vec<uint32_t>>(alternating<uint16_t, 1>(a, b, each));
}

// a's values, then b's: half vectors.
template <class V, int... lane>
MOE_INLINE auto join(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, lane...);
}

// rows[i][j] becomes rows[j][i], in log2(n) rounds over pairs of rows `step` apart.
template <class E, int step = 1>
MOE_INLINE void transpose(Vec<E>* rows) {
  constexpr int n = kLanes<E>;
  if constexpr (step < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & step))
        unzip<E, (step < 16 / int(sizeof(E)))>(rows[i], rows[i + step], std::make_integer_sequence<int, n>());
    transpose<E, 2 * step>(rows);
  }
}

// As many rows as 16 bytes hold values: unit u of rows[i] becomes value i of unit u of every row.
template <class E>
MOE_INLINE void transpose_units(Vec<E>* rows) {
  constexpr int unit = 16 / int(sizeof(E));
#pragma GCC unroll 2
  for (int step = 1; step < unit; step *= 2)
#pragma GCC unroll 4
    for (int i = 0; i < unit; ++i)
      if (!(i & step)) unzip<E, true>(rows[i], rows[i + step], std::make_integer_sequence<int, kLanes<E>>());
}

template <int unit, class E, int... lane>
MOE_INLINE void store_unit(E* to, Vec<E> v, std::integer_sequence<int, lane...>) {
  const auto values = __builtin_shufflevector(v, v, (unit * int(sizeof...(lane)) + lane)...);
  std::memcpy(to, &values, sizeof(values));
}

// Unit i of v to `to + i * stride`.
template <class E, int... unit>
MOE_INLINE void store_units(E* to, int64_t stride, Vec<E> v, std::integer_sequence<int, unit...>) {
  (store_unit<unit>(to + unit * stride, v, std::make_integer_sequence<int, 16 / int(sizeof(E))>()), ...);
}

// columns [count, lanes] become rows [rows, count].
template <class E>
MOE_INLINE void store_rows(const E* columns, int64_t count, int rows, E* out) {
  constexpr int n = kLanes<E>;
  for (int64_t begin = 0; begin < count; begin += n) {
    Vec<E> block[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) block[i] = begin + i < count ? load<E>(columns + (begin + i) * n) : Vec<E>{};
    transpose<E>(block);
    // A row that is shorter than a vector is stored with what the next one overwrites.
    for (int i = 0; i < rows; ++i) {
      const int64_t room = count <= n ? (rows - i) * count : count - begin;
      store<E>(out + i * count + begin, block[i], room);
    }
  }
}

}  // namespace moe::MOE_ISA
