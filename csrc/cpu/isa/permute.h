// permute: each token's row is read once and written to all of its places.
// Bound by memory: most bytes are written, so that the order of tokens, in which every byte of x is read once, beats
// the order of rows, in which a row is read top_k times.
#pragma once

#include "cpu/isa/buffer.h"
#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

// Line by line, so that one read serves all places.
MOE_INLINE void stream_row(const char* from, int64_t bytes, char* const* to, int64_t places) {
  constexpr int vectors = kLine / MOE_VECTOR_BYTES;
  for (int64_t at = 0; at < bytes; at += kLine) {
    Vec<int32_t> line[vectors];
    std::memcpy(line, from + at, kLine);
    for (int64_t i = 0; i < places; ++i)
      for (int v = 0; v < vectors; ++v) stream_vector(to[i] + at + v * MOE_VECTOR_BYTES, line[v]);
  }
}

// Tokens begin..end.
inline void permute(const PermuteParams& p, int64_t begin, int64_t end) {
  const bool streamed = is_streamed(p.out, p.rows, p.row_bytes);
  Buffer<char*> to(p.width);
  for (int64_t token = begin; token < end; ++token) {
    const char* from = static_cast<const char*>(p.x) + token * p.x_stride_bytes;
    int64_t places = 0;
    for (int64_t slot = token * p.width; slot < (token + 1) * p.width; ++slot) {
      const int64_t row = p.slot_row[slot];
      if (row >= 0 && row < p.rows && p.row_slot[row] == slot)
        to[places++] = static_cast<char*>(p.out) + row * p.row_bytes;
    }
    if (streamed) stream_row(from, p.row_bytes, to, places);
    else
      for (int64_t i = 0; i < places; ++i) std::memcpy(to[i], from, p.row_bytes);
  }
  if (streamed) end_of_stream();
}

}  // namespace moe::MOE_ISA
