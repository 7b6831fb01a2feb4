// The loops behind a machine's roofs, for one instruction set: arithmetic that never waits for memory, and reading that
// never waits for arithmetic. cpu/roof.cpp runs them on every thread at once and times them.
#pragma once

#include "cpu/isa/stream.h"

namespace moe::MOE_ISA {

// Independent chains: 12 hide a latency of 6 cycles on two ports; with 32 registers as many as the micro-kernel has
// accumulators.
inline constexpr int kChains = MOE_VECTOR_BYTES == 64 ? 24 : 12;

// acc = acc * factor + term: the accumulator is multiplied so that nothing can be hoisted out of the loop, and
// converges to term / (1 - factor), so that no chain overflows or becomes denormal.
template <class C>
double multiply_add(int64_t rounds, double* sink) {
  Vec<C> acc[kChains], factor = broadcast(C(sink[0])), term = broadcast(C(sink[1]));
  for (auto& chain : acc) chain = term;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (auto& chain : acc) chain = chain * factor + term;
  }
  for (auto& chain : acc) sink[2] += sum_lanes<C>(chain);
  return 2.0 * kChains * kLanes<C> * rounds;
}

#ifdef __AVX512BF16__
inline double dot_bfloat16(int64_t rounds, double* sink) {
  __m512 acc[kChains];
  for (auto& chain : acc) chain = _mm512_set1_ps(float(sink[1]));
  const __m512bh a = _mm512_cvtne2ps_pbh(acc[0], acc[1]), b = a;
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (auto& chain : acc) chain = _mm512_dpbf16_ps(chain, a, b);
  }
  for (auto& chain : acc) sink[2] += chain[0];
  return 4.0 * kChains * kLanes<float> * rounds;
}
#endif

// Multiplies and adds `rounds` times on one thread and returns the FLOPs done; 0 where a dtype has no arithmetic of its
// own (its products are computed in float32). sink: factor, term, and where the result goes so that the work is not
// dropped.
inline double roof_arithmetic(Dtype dtype, int64_t rounds, double* sink) {
  switch (dtype) {
    case Dtype::float32: return multiply_add<float>(rounds, sink);
    case Dtype::float64: return multiply_add<double>(rounds, sink);
#ifdef __AVX512BF16__
    case Dtype::bfloat16: return dot_bfloat16(rounds, sink);
#endif
    default: return 0;
  }
}

inline constexpr int64_t kAhead = 512;  // values of a stream between a line asked for and the one that is read

template <int streams>
void read_streams(const float* from, int64_t bytes, double* sink) {
  const int64_t length = bytes / int64_t(streams * sizeof(Vec<float>)) * kLanes<float>;  // of one stream
  Vec<float> sum[streams]{};
  for (int64_t i = 0; i < length; i += kLanes<float>)
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) {
      __builtin_prefetch(from + s * length + i + kAhead, 0, 2);
      sum[s] += load<float>(from + s * length + i);
    }
  for (auto& part : sum) sink[2] += sum_lanes<float>(part);
}

// Reads 2 or 8 streams side by side: which of them moves more depends on how busy the memory is. Lines are asked for
// into L2: into L1, fewer can be under way.
inline void roof_read(const float* from, int64_t bytes, int streams, double* sink) {
  if (streams == 2) read_streams<2>(from, bytes, sink);
  else read_streams<8>(from, bytes, sink);
}

// Reads and writes so many bytes in order, nothing computed, in four streams side by side; stores go past the caches,
// so that nothing else is read. No line is asked for ahead: with four streams that was measured to gain nothing, and to
// lose where more is written than read. `to` is aligned to 64 bytes; what does not fill lines of all streams is left
// out.
inline void roof_move(float* to, int64_t written, const float* from, int64_t read) {
  constexpr int kStreams = 4, kStep = kLine / int(sizeof(float));
  const int64_t writes = written / (kStreams * kLine), reads = read / (kStreams * kLine);  // lines of one stream
  Vec<float> sum[kStreams]{};                   // all that was read, so that no read is dropped
  const int64_t steps = reads > 0 ? reads : 1;  // where nothing is read all is written at once
  int64_t done = 0;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 4
    for (int s = 0; i < reads && s < kStreams; ++s)
      for (int lane = 0; lane < kStep; lane += kLanes<float>)
        sum[s] += load<float>(from + (s * reads + i) * kStep + lane);
    for (; done * steps < (i + 1) * writes; ++done)
#pragma GCC unroll 4
      for (int s = 0; s < kStreams; ++s)
        for (int lane = 0; lane < kStep; lane += kLanes<float>)
          stream_vector(to + (s * writes + done) * kStep + lane, sum[s]);
  }
  end_of_stream();
}

}  // namespace moe::MOE_ISA
