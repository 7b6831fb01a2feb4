// The bf16 dot product of AVX-512-BF16: what one instruction does. tests/ has a twin of this file for processors
// without it.
#pragma once

#include "cpu/isa/vec.h"

namespace moe::MOE_ISA {

#ifdef __AVX512BF16__
inline constexpr bool kHasDot = true;

// acc + a.low * b.low + a.high * b.high per lane, where a lane of a and b holds two bf16 values.
MOE_INLINE Vec<float> dot_pairs(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
#else
inline constexpr bool kHasDot = false;

Vec<float> dot_pairs(Vec<float>, Vec<uint32_t>, Vec<uint32_t>);  // never called
#endif

}  // namespace moe::MOE_ISA
