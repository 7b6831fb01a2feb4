"""Gradients of the operators: what each keeps for backward and which operator computes it.

Backward reuses forward where it can: permute and combine without weights are each other's gradient, and the gradient of
grouped_gemm's rows is grouped_gemm with transposed weights. The operators for backward or inference alone have no
gradient of their own, and say so when one is asked for. torch.vmap over any operator is refused.

Integer outputs carry no gradient. Only gradients that are needed are computed.

To record a formula registered in Python takes torch longer than a small layer takes to compute. So `call` records the
same formula as a torch.autograd.Function wherever nobody looks for the operator itself.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import has_torch_function

from moe_ops.library import OPERATORS
from moe_ops.types import lies_transposed

ops = torch.ops.moe_ops

_NOT_TWICE = "{} cannot be differentiated twice (double backward, create_graph=True)"

# The operators that have no gradient, and why.
WITHOUT_GRADIENT = {
    "route_backward": _NOT_TWICE.format("route"),
    "grouped_gemm_weight_grad": _NOT_TWICE.format("grouped_gemm"),
    "grouped_gemm_bias_grad": _NOT_TWICE.format("grouped_gemm"),
    "combine_backward": _NOT_TWICE.format("combine"),
    "moe_mlp_inference": "it keeps nothing for backward, call moe_ops::moe_mlp",
    "moe_mlp_backward": _NOT_TWICE.format("moe_mlp"),
}

Gradients = tuple[Tensor | None, ...]


def register() -> None:
    """Registers the gradients and refusals of every operator."""
    for name, (keep, backward) in FORMULAS.items():
        torch.library.register_autograd(f"moe_ops::{name}", backward, setup_context=keep)
        operator = getattr(ops, name)
        _RECORDERS[operator] = _recorder(operator, keep, backward)
    for name in WITHOUT_GRADIENT:
        torch.library.register_autograd(f"moe_ops::{name}", _refuse_backward(name))
    for name in OPERATORS:
        torch.library.register_vmap(f"moe_ops::{name}", _refuse_vmap(name))


def call(operator: Any, *args: Any) -> Any:
    """operator(*args), with its gradient.

    Tracers, torch.func and arguments that override torch's functions meet the operator and its registered formula.
    """
    if _is_observed(args):
        return operator(*args)
    if is_grad_enabled() and _any_requires_grad(*args):
        return _RECORDERS.get(operator, operator)(*args)
    return without_autograd(operator.default, *args)


def is_plain_inference(args: tuple[Any, ...]) -> bool:
    """Whether values alone are asked for: under no_grad, without forward-mode AD, and nobody observes."""
    return not (is_grad_enabled() or forward_ad._current_level >= 0 or _is_observed(args))


def _is_observed(args: tuple[Any, ...]) -> bool:
    """Whether a tracer, torch.func or an override of torch's functions must meet the operator itself."""
    watched = is_compiling() or not _HAS_INTERNALS or _is_tracing() or _are_transforms_active()
    return watched or has_torch_function(args)


def without_autograd(operator: Any, *args: Any) -> Any:
    """Calls an operator's overload below torch's autograd layer."""
    with _AutoDispatchBelowAutograd():
        return operator(*args)


_RECORDERS: dict[Any, Any] = {}  # of the operators that have a formula

# What the functions above use of torch that has no public name: a torch that lacks some gets the operators as they are.
try:
    from torch._C import _any_requires_grad, _AutoDispatchBelowAutograd, _is_tracing
    from torch._C import _are_functorch_transforms_active as _are_transforms_active
except ImportError:
    _HAS_INTERNALS = False
else:
    _HAS_INTERNALS = True


def _recorder(operator: Any, keep: Callable[..., None], backward: Callable[..., Any]) -> Any:
    def forward(ctx: Any, *args: Any) -> Any:
        output = without_autograd(operator.default, *args)
        keep(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(operator.__name__, (torch.autograd.Function,), methods)
    return function.apply


def _refuse_backward(name: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"moe_ops::{name} has no gradient: {WITHOUT_GRADIENT[name]}")

    return backward


def _refuse_vmap(name: str) -> Callable[..., NoReturn]:
    def rule(info: Any, in_dims: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"moe_ops::{name} does not support torch.vmap: "
            "fold the batch into the tokens, which the operators take in any number"
        )

    return rule


def _refuse_packed(name: str, *panels: Tensor | None) -> None:
    if any(values is not None for values in panels):
        raise RuntimeError(f"moe_ops::{name}: a PackedWeight has no gradient")


def _keep_route(ctx: Any, inputs: Any, output: Any) -> None:
    logits, _, score, _, expert_scale, _, _, _, _, *weighing, stats, segments, num_segments = inputs
    _, experts, counts, mean_prob, logsumexp = output
    ctx.save_for_backward(logits, experts, expert_scale, segments)
    ctx.score, ctx.weighing, ctx.num_segments = score, weighing, num_segments
    ctx.mark_non_differentiable(experts, counts, *(() if stats else (mean_prob, logsumexp)))
    ctx.set_materialize_grads(False)


def _route_backward(
    ctx: Any,
    grad_weights: Tensor | None,
    _experts: None,
    _counts: None,
    grad_mean: Tensor | None,
    grad_lse: Tensor | None,
) -> Gradients:
    grads: list[Tensor | None] = [None] * 17
    if grad_weights is None and grad_mean is None and grad_lse is None:
        return tuple(grads)
    logits, experts, expert_scale, segments = ctx.saved_tensors
    grad_logits, grad_scale = call(
        ops.route_backward, grad_weights, grad_mean, grad_lse, logits, experts, ctx.score, expert_scale, *ctx.weighing,
        segments, ctx.num_segments,
    )  # fmt: skip
    if ctx.needs_input_grad[0]:
        grads[0] = grad_logits
    if ctx.needs_input_grad[4]:
        grads[4] = grad_scale
    return tuple(grads)


def _keep_permute(ctx: Any, inputs: Any, output: Any) -> None:
    _, row_slot, slot_row = inputs
    ctx.save_for_backward(row_slot, slot_row)


def _permute_backward(ctx: Any, grad: Tensor) -> Gradients:
    row_slot, slot_row = ctx.saved_tensors
    return call(ops.combine, grad, None, row_slot, slot_row), None, None


def _keep_grouped_gemm(ctx: Any, inputs: Any, output: Any) -> None:
    a, weight, offsets, bias, row_slot, slot_row, panels, *numerics = inputs
    _refuse_packed("grouped_gemm", panels)
    need_a, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if need_weight else None, weight if need_a else None, offsets, row_slot, slot_row)
    ctx.weight_dtype, ctx.transposed, ctx.numerics = weight.dtype, lies_transposed(weight), numerics
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.main_grad = getattr(weight, "main_grad", None) if need_weight else None


def _grouped_gemm_backward(ctx: Any, grad: Tensor) -> Gradients:
    a, weight, offsets, row_slot, slot_row = ctx.saved_tensors
    allow_tf32, batch_invariant = ctx.numerics
    grad_a = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        transposed = weight.transpose(1, 2)
        grad_a = call(ops.grouped_gemm, grad, transposed, offsets, None, None, None, None, allow_tf32, batch_invariant)
        if row_slot is not None:
            grad_a = call(ops.combine, grad_a, None, row_slot, slot_row)
    if ctx.needs_input_grad[1]:
        width = 1 if slot_row is None else slot_row.shape[1]
        if ctx.main_grad is None:
            grad_weight = call(
                ops.grouped_gemm_weight_grad, grad, a, offsets, row_slot, width, ctx.weight_dtype, allow_tf32,
                ctx.transposed,
            )  # fmt: skip
        else:
            call(ops.grouped_gemm_weight_grad_, ctx.main_grad, grad, a, offsets, row_slot, width, allow_tf32)
    if ctx.needs_input_grad[3]:
        grad_bias = call(ops.grouped_gemm_bias_grad, grad, offsets, ctx.bias_dtype)
    return grad_a, grad_weight, None, grad_bias, None, None, None, None, None


def _keep_combine(ctx: Any, inputs: Any, output: Any) -> None:
    rows, weights, row_slot, slot_row = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, row_slot, slot_row)


def _combine_backward(ctx: Any, grad: Tensor) -> Gradients:
    rows, weights, row_slot, slot_row = ctx.saved_tensors
    need_rows, need_weights = ctx.needs_input_grad[:2]
    if weights is None:
        return call(ops.permute, grad, row_slot, slot_row), None, None, None
    grad_rows, grad_weights = call(
        ops.combine_backward, grad, rows, weights, row_slot, slot_row, need_rows, need_weights
    )
    return grad_rows if need_rows else None, grad_weights if need_weights else None, None, None


def _keep_moe_mlp(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, w_in, w_out, b_in, b_out, offsets, row_slot, slot_row, *options, keep_pre, in_, out_ = inputs
    _refuse_packed("moe_mlp", in_, out_)
    pre = output[1]
    ctx.save_for_backward(x, pre, weights, w_in, w_out, b_out, offsets, row_slot, slot_row)
    ctx.options = options
    ctx.b_in_dtype = None if b_in is None else b_in.dtype
    ctx.keep_pre = keep_pre
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _moe_mlp_backward(ctx: Any, grad_y: Tensor | None, _pre: None) -> Gradients:
    nothing = (None,) * 15
    if grad_y is None:
        return (None,) * 6 + nothing
    if not ctx.keep_pre:
        raise RuntimeError("moe_ops::moe_mlp kept no pre-activation for backward: call it with keep_pre=True")
    need_x, need_weights, need_w_in, need_w_out, need_b_in, need_b_out = ctx.needs_input_grad[:6]
    x, pre, weights, w_in, w_out, b_out, offsets, row_slot, slot_row = ctx.saved_tensors
    grad_x, grad_weights, grad_w_in, grad_w_out, grad_b_in, grad_b_out = call(
        ops.moe_mlp_backward, grad_y, x, pre, weights, w_in, w_out, b_out, offsets, row_slot, slot_row, *ctx.options,
        ctx.b_in_dtype if need_b_in else None, need_x, need_weights, need_w_in, need_w_out, need_b_out,
    )  # fmt: skip
    return (
        grad_x if need_x else None,
        grad_weights if need_weights else None,
        grad_w_in if need_w_in else None,
        grad_w_out if need_w_out else None,
        grad_b_in if need_b_in else None,
        grad_b_out if need_b_out else None,
        *nothing,
    )


# What each keeps, and its backward.
FORMULAS: dict[str, tuple[Callable[..., None], Callable[..., Gradients]]] = {
    "route": (_keep_route, _route_backward),
    "permute": (_keep_permute, _permute_backward),
    "grouped_gemm": (_keep_grouped_gemm, _grouped_gemm_backward),
    "combine": (_keep_combine, _combine_backward),
    "moe_mlp": (_keep_moe_mlp, _moe_mlp_backward),
}
