// The ways to start a weight gradient; grouped_gemm_weight_grad.cu chooses.
#pragma once

#include "stages/stages.h"

namespace moe {

// False where it does not take the problem and has started nothing: other cards, float32, operands or gradients that 16
// bytes at a time do not reach, no rows, more experts than it ranks.
bool grouped_gemm_weight_grad_sm90(const WeightGradParams&, const Device&);

}  // namespace moe
