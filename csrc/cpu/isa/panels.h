// Few rows times several panels of packed weights side by side. A core reads one run of memory at two thirds of the
// rate at which it reads eight; so while few rows leave registers free, several panels are read at a time, each asked
// for ahead into L2 (into L1, too few lines can be under way). An element's sum is that of multiply.h.
#pragma once

#include "cpu/isa/multiply.h"

namespace moe::MOE_ISA {

inline constexpr int kMostStreams = 8;

// Panels whose sums find room in the registers of the micro-kernel: 8, 4, 2 or 1.
template <class Ar>
constexpr int streams_for(int64_t rows) {
  int streams = kMostStreams;
  while (streams > 1 && streams * rows * kPanel<Ar> > kMicroRows * kMicroCols<Ar>) streams /= 2;
  return streams;
}

// A panel from some step on, and where its columns stand in the tile.
template <class Ar>
struct Stream {
  const typename Ar::Element* from;
  typename Ar::C* to;
};

// to[rows, kPanel] (+)= a[rows, depth] . from[depth, kPanel] for each stream.
template <class Ar, int rows, int streams>
void multiply_panels(const typename Ar::Element* a, const Stream<Ar>* all, int64_t depth, bool first) {
  using C = typename Ar::C;
  using Element = typename Ar::Element;
  constexpr int lanes = kLanes<C>, vectors = kPanel<Ar> / lanes;
  constexpr int kStep = kPanel<Ar> * sizeof(Element), kAheadBytes = 16 * kStep;
  const Element* from[streams];
  for (int s = 0; s < streams; ++s) from[s] = all[s].from;
  Vec<C> acc[rows][streams][vectors] = {};

  for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) {
      const Element* step = from[s] + k * kPanel<Ar>;
      for (int line = 0; line < kStep; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(step) + kAheadBytes + line, 0, 2);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) {
        const auto panel = load_vector<Element>(step + j * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < rows; ++i)
          acc[i][s][j] = Ar::step(acc[i][s][j], broadcast(a[i * RowsOfA<Ar>::kRowStride + k]), panel);
      }
    }
  }

#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) join_sum<C>(all[s].to + i * kTileCols + j * lanes, acc[i][s][j], first);
}

// As many of the `count` streams as fit side by side, at most 8; returns how many, or 0 where one is all that fits.
template <class Ar, int rows = 1, int streams = streams_for<Ar>(rows)>
int64_t multiply_some_panels(int64_t n, const typename Ar::Element* a, const Stream<Ar>* all, int64_t count,
                             int64_t depth, bool first) {
  if constexpr (streams < 2) {
    return 0;
  } else {
    if (n > rows) return multiply_some_panels<Ar, rows + 1>(n, a, all, count, depth, first);
    if (count < streams) return multiply_some_panels<Ar, rows, streams / 2>(n, a, all, count, depth, first);
    multiply_panels<Ar, rows, streams>(a, all, depth, first);
    return streams;
  }
}

}  // namespace moe::MOE_ISA
