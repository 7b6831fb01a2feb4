// plan: which row each slot takes.
#include <limits>
#include <tuple>

#include "ops/check.h"

namespace moe {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> plan_op(const Tensor& experts_, int64_t num_experts,
                                                   std::optional<int64_t> capacity, int64_t drop_policy,
                                                   const OptionalTensor& weights_) {
  const bool is_int64 = expect_ids("plan: experts", experts_, {-1, -1});
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(num_experts >= 1 && num_experts < limit, "plan: num_experts must be between 1 and 2^31 - 2");
  STD_TORCH_CHECK(!capacity || *capacity >= 0, "plan: capacity must not be negative");
  STD_TORCH_CHECK(drop_policy >= 0 && drop_policy <= int64_t(DropPolicy::probability), "plan: no such drop_policy");
  bool by_weight = capacity && DropPolicy(drop_policy) == DropPolicy::probability;
  STD_TORCH_CHECK(!by_weight || weights_, "plan: drop_policy probability needs weights");

  const int64_t tokens = experts_.size(0), top_k = experts_.size(1), rows = tokens * top_k;
  Tensor experts = as_contiguous(experts_);
  OptionalTensor weights;
  if (by_weight) {
    expect_shape("plan: weights", *weights_, {tokens, top_k});
    weights = as_contiguous(*weights_);
  }
  Tensor offsets = empty({num_experts + 1}, ScalarType::Int, experts);
  Tensor row_slot = empty({rows}, ScalarType::Int, experts);
  Tensor slot_row = empty({tokens, top_k}, ScalarType::Int, experts);
  Tensor counts = empty({num_experts}, ScalarType::Int, experts);
  plan(
      {
          .experts = experts.data_ptr(),
          .experts_are_int64 = is_int64,
          .tokens = tokens,
          .top_k = top_k,
          .num_experts = num_experts,
          .capacity = capacity.value_or(std::numeric_limits<int64_t>::max()),
          .drop_policy = DropPolicy(drop_policy),
          .weights = vector(weights),
          .offsets = int32s(offsets),
          .row_slot = int32s(row_slot),
          .slot_row = int32s(slot_row),
          .counts = int32s(counts),
      },
      Device(experts));
  return {offsets, row_slot, slot_row, counts};
}

const Register kPlan("plan", TORCH_BOX(&plan_op));

}  // namespace
}  // namespace moe
