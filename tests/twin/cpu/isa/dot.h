// The twin of csrc/cpu/isa/dot.h: what AVX-512-BF16's dot product computes, for processors that only have AVX-512. A
// build with MOE_OPS_DOT_TWIN finds this file first and so runs the paired path everywhere. VDPBF16PS, Intel SDM volume
// 2: the high products are added first, each in one rounding; denormals count as zero, in and out.
#pragma once

#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

inline constexpr bool kHasDot = true;

MOE_INLINE Vec<float> flush_denormals(Vec<float> v) {
  return (bit_cast<Vec<uint32_t>>(v) & 0x7f800000) == 0 ? Vec<float>{} : v;
}

MOE_INLINE Vec<float> dot_pairs(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  const auto high = [](Vec<uint32_t> v) { return flush_denormals(bit_cast<Vec<float>>(v & 0xffff0000)); };
  const auto low = [](Vec<uint32_t> v) { return flush_denormals(bit_cast<Vec<float>>(v << 16)); };
  acc = flush_denormals(flush_denormals(acc) + high(a) * high(b));
  return flush_denormals(acc + low(a) * low(b));
}

}  // namespace moe::MOE_ISA
