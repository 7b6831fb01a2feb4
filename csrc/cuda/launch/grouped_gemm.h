// The ways to start a grouped GEMM; grouped_gemm.cu chooses.
#pragma once

#include "stages/stages.h"

namespace moe {

// So few rows that reading the weights bounds it. Float32 stays float32 there: TF32 would save no byte.
inline constexpr int64_t kFewRowsOfProblem = 64;
void grouped_gemm_few_rows(const GroupedGemmParams&, const Device&);

// False where it does not take the problem and has started nothing: other cards, float32, weights of another dtype, a
// route weight on the input, operands that 16 bytes at a time do not reach.
bool grouped_gemm_sm90(const GroupedGemmParams&, const Device&);

// p.grad_score from parts [R, col_tiles], what each tile of columns adds to <dA', A>.
void sum_score_gradients(const GroupedGemmParams& p, const float* parts, int64_t col_tiles, const Device&);

}  // namespace moe
