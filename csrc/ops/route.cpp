// The operators route and route_backward.
#include <cstdint>
#include <limits>
#include <tuple>

#include "ops/check.h"

namespace moe {
namespace {

OptionalTensor as_type(const OptionalTensor& t, ScalarType type) {
  if (!t) return std::nullopt;
  return as_contiguous(t->scalar_type() == type ? *t : torch::stable::to(*t, type));
}

// [E] in the compute dtype.
OptionalTensor per_expert(const char* what, const OptionalTensor& t, const Tensor& logits) {
  if (t) expect_shape(what, *t, {logits.size(1)});
  return as_type(t, compute_type(logits));
}

// [T] int32; an int64 value out of range becomes num_segments or -1, which count nowhere either, before it is narrowed.
OptionalTensor segments_of(const OptionalTensor& t, int64_t tokens, int64_t num_segments) {
  STD_TORCH_CHECK(num_segments >= 0 && num_segments <= std::numeric_limits<int32_t>::max(),
                  "route: num_segments is out of range");
  if (!t) return std::nullopt;
  expect_shape("route: segments", *t, {tokens});
  if (t->scalar_type() == ScalarType::Int) return as_contiguous(*t);
  expect_type("route: segments", *t, ScalarType::Long);
  using torch::stable::detail::from;
  Tensor low = torch::stable::new_empty(*t, {}), high = torch::stable::new_empty(*t, {});
  torch::stable::fill_(low, -1);
  torch::stable::fill_(high, double(num_segments));
  StableIValue stack[] = {from(*t), from(OptionalTensor(low)), from(OptionalTensor(high))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::clamp", "Tensor", stack, TORCH_ABI_VERSION));
  return as_type(torch::stable::detail::to<Tensor>(stack[0]), ScalarType::Int);
}

void expect_compute(const char* what, const Tensor& t, const Tensor& logits, std::initializer_list<int64_t> shape) {
  expect_shape(what, t, shape);
  expect_type(what, t, compute_type(logits));
}

RouteOptions options_of(int64_t score, int64_t renormalize, double eps, double p, double scale, double softcap) {
  return {.score = Score(score),
          .renormalize = Renormalize(renormalize),
          .eps = eps,
          .p = p,
          .scale = scale,
          .softcap = softcap};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> route_op(Tensor logits, int64_t top_k, int64_t score,
                                                            OptionalTensor selection_bias, OptionalTensor expert_scale,
                                                            int64_t num_groups, int64_t top_groups, int64_t group_score,
                                                            int64_t group_mask, int64_t renormalize, double eps,
                                                            double p, double scale, double softcap, bool stats,
                                                            OptionalTensor segments, int64_t num_segments) {
  expect_shape("route: logits", logits, {-1, -1});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(experts <= std::numeric_limits<int32_t>::max(), "route: too many experts");
  STD_TORCH_CHECK(top_k >= 0 && top_k <= experts, "route: top_k must be between 0 and the number of experts");
  STD_TORCH_CHECK(num_groups >= 1 && experts % num_groups == 0, "route: num_groups must divide the number of experts");
  STD_TORCH_CHECK(top_groups >= 0 && top_groups <= num_groups, "route: top_groups must be between 0 and num_groups");

  const Tensor rows = with_unit_rows(logits);
  const OptionalTensor bias = per_expert("route: selection_bias", selection_bias, logits);
  const OptionalTensor scales = per_expert("route: expert_scale", expert_scale, logits);
  const OptionalTensor segment = stats ? segments_of(segments, tokens, num_segments) : std::nullopt;

  const ScalarType compute = compute_type(logits);
  Tensor weights = empty({tokens, top_k}, compute, logits);
  Tensor chosen = empty({tokens, top_k}, ScalarType::Int, logits);
  Tensor counts = stats ? empty({num_segments, experts}, ScalarType::Int, logits) : empty({0}, ScalarType::Int, logits);
  Tensor mean_prob = stats ? empty({num_segments, experts}, compute, logits) : empty({0}, compute, logits);
  Tensor logsumexp = empty({stats ? tokens : 0}, compute, logits);

  RouteParams params{
      .logits = matrix(rows),
      .tokens = tokens,
      .experts = experts,
      .top_k = top_k,
      .options = options_of(score, renormalize, eps, p, scale, softcap),
      .selection_bias = moe::data<void>(bias),
      .expert_scale = moe::data<void>(scales),
      .num_groups = num_groups,
      .top_groups = top_groups,
      .group_score = GroupScore(group_score),
      .group_mask = GroupMask(group_mask),
      .weights = weights.data_ptr(),
      .chosen = int32s(chosen),
  };
  if (stats) {
    params.segments = moe::data<int32_t>(segment);
    params.num_segments = num_segments;
    params.counts = int32s(counts);
    params.mean_prob = mean_prob.data_ptr();
    params.logsumexp = logsumexp.data_ptr();
  }
  route(params, Device(logits));
  return {weights, chosen, counts, mean_prob, logsumexp};
}

std::tuple<Tensor, Tensor> route_backward_op(OptionalTensor grad_weights, OptionalTensor grad_mean_prob,
                                             OptionalTensor grad_logsumexp, Tensor logits, Tensor chosen, int64_t score,
                                             OptionalTensor expert_scale, int64_t renormalize, double eps, double p,
                                             double scale, double softcap, OptionalTensor segments,
                                             int64_t num_segments) {
  expect_shape("route_backward: logits", logits, {-1, -1});
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  expect_shape("route_backward: experts", chosen, {tokens, -1});
  expect_type("route_backward: experts", chosen, ScalarType::Int);
  const int64_t top_k = chosen.size(1);
  if (grad_weights) expect_compute("route_backward: grad_weights", *grad_weights, logits, {tokens, top_k});
  if (grad_mean_prob)
    expect_compute("route_backward: grad_mean_prob", *grad_mean_prob, logits, {num_segments, experts});
  if (grad_logsumexp) expect_compute("route_backward: grad_logsumexp", *grad_logsumexp, logits, {tokens});

  grad_weights = as_contiguous(grad_weights);
  grad_mean_prob = as_contiguous(grad_mean_prob);
  grad_logsumexp = as_contiguous(grad_logsumexp);
  const Tensor rows = with_unit_rows(logits), ids = as_contiguous(chosen);
  const OptionalTensor scales = per_expert("route_backward: expert_scale", expert_scale, logits);
  const OptionalTensor segment = grad_mean_prob ? segments_of(segments, tokens, num_segments) : std::nullopt;

  Tensor grad_logits = empty({tokens, experts}, logits.scalar_type(), logits);
  Tensor grad_expert_scale = empty({scales ? experts : 0}, compute_type(logits), logits);
  route_backward(
      {
          .grad_weights = moe::data<void>(grad_weights),
          .grad_mean_prob = moe::data<void>(grad_mean_prob),
          .grad_logsumexp = moe::data<void>(grad_logsumexp),
          .logits = matrix(rows),
          .chosen = int32s(ids),
          .tokens = tokens,
          .experts = experts,
          .top_k = top_k,
          .options = options_of(score, renormalize, eps, p, scale, softcap),
          .expert_scale = moe::data<void>(scales),
          .segments = moe::data<int32_t>(segment),
          .num_segments = grad_mean_prob ? num_segments : 0,
          .grad_logits = matrix(grad_logits),
          .grad_expert_scale = grad_expert_scale.data_ptr(),
      },
      Device(logits));
  return {grad_logits, grad_expert_scale};
}

const Register kRoute("route", TORCH_BOX(&route_op));
const Register kRouteBackward("route_backward", TORCH_BOX(&route_backward_op));

}  // namespace
}  // namespace moe
