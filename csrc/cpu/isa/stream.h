// Outputs too large to be found in a cache by whoever reads them are stored past it: no line is read before it is
// overwritten, and the operands stay where they are.
#pragma once

#include "cpu/isa/vec.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace moe::MOE_ISA {

inline constexpr int kLine = 64;  // bytes of a cache line
// Outputs of so much are streamed, operands of so much fetched ahead.
inline constexpr int64_t kStreamedBytes = int64_t(8) << 20;

// Whether rows that lie contiguous from `to` on are stored past the cache. Only whole lines are: a part of one would be
// read first.
inline bool is_streamed(const void* to, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamedBytes && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
}

// `to` is aligned to the vector.
template <class V>
MOE_INLINE void stream_vector(void* to, V v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
#endif
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
#endif
#ifdef __SSE2__
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
#endif
  std::memcpy(to, &v, sizeof(v));
}

// Before others may read what was streamed.
MOE_INLINE void end_of_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Into the cache of this level: 1 or 2. A function that only asks for memory must be inlined: gcc sees no effect in it
// and drops its calls.
template <int level, class S>
MOE_INLINE void fetch_ahead(const S* from, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(from);
  for (int64_t at = 0; at < count * int64_t(sizeof(S)); at += kLine) __builtin_prefetch(bytes + at, 0, 4 - level);
}

}  // namespace moe::MOE_ISA
