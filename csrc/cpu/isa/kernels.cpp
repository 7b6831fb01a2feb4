// The table of one instruction set; compiled once for each (see vec.h).
#include "cpu/isa/combine.h"
#include "cpu/isa/grouped_gemm.h"
#include "cpu/isa/permute.h"
#include "cpu/isa/roof.h"
#include "cpu/isa/route.h"
#include "cpu/isa/route_backward.h"
#include "cpu/isa/table.h"
#include "cpu/isa/vec.h"
#include "cpu/isa/weight_grad.h"

#define MOE_STRING(x) #x
#define MOE_NAME(x) MOE_STRING(x)

namespace moe::MOE_ISA {

extern const Kernels kTable{
    .name = MOE_NAME(MOE_ISA),
    .route = route,
    .route_backward = route_backward,
    .permute = permute,
    .combine = combine,
    .combine_backward = combine_backward,
    .grouped_gemm = grouped_gemm,
    .grouped_gemm_weight_grad = grouped_gemm_weight_grad,
    .grouped_gemm_bias_grad = grouped_gemm_bias_grad,
    .roof_arithmetic = roof_arithmetic,
    .roof_read = roof_read,
    .roof_move = roof_move,
};

}  // namespace moe::MOE_ISA
