// The pipeline on one screen. Every device supplies these functions; ops/ calls them and never asks which device it is.
#pragma once

#include "stages/params.h"

namespace moe {

struct Device;  // where and on what stream a stage runs; each device's device.h defines it

void route(const RouteParams&, const Device&);
void route_backward(const RouteBackwardParams&, const Device&);
void plan(const PlanParams&, const Device&);
void permute(const PermuteParams&, const Device&);
void combine(const CombineParams&, const Device&);
void combine_backward(const CombineBackwardParams&, const Device&);
void grouped_gemm(const GroupedGemmParams&, const Device&);
void grouped_gemm_weight_grad(const WeightGradParams&, const Device&);
void grouped_gemm_bias_grad(const BiasGradParams&, const Device&);

}  // namespace moe
