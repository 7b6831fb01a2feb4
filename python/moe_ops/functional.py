"""What is composed of the five verbs: dispatch, from tokens to rows; combine, back; moe_mlp, from tokens to tokens."""

from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from moe_ops import autocast, checks, exchange, numerics, ops, packing
from moe_ops.autograd import call, is_plain_inference, without_autograd
from moe_ops.packing import operand
from moe_ops.types import ExpertParallelPlan, PackedWeight, Plan

_moe_mlp_inference = torch.ops.moe_ops.moe_mlp_inference.default

Options = tuple[int, bool, float, float, float, bool, int]  # of moe_mlp, from activation to drop_policy


@overload
def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = ...,
    drop_policy: str = ...,
    weights: Tensor | None = ...,
    group: None = ...,
) -> tuple[Tensor, Plan]: ...
@overload
def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = ...,
    drop_policy: str = ...,
    weights: Tensor | None = ...,
    group: Any,
    mode: Literal["exact", "bounded"] = ...,
    rows_per_peer: int | None = ...,
    name: str | None = ...,
) -> tuple[Tensor, ExpertParallelPlan]: ...
def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    weights: Tensor | None = None,
    group: Any = None,
    mode: str = "exact",
    rows_per_peer: int | None = None,
    name: str | None = None,
) -> tuple[Tensor, Plan | ExpertParallelPlan]:
    """Plans, then permutes: the tokens' rows in expert order, and the plan that combine takes back.

    With a process group of W ranks, rank r owns the experts r * ceil(E / W) .. (r + 1) * ceil(E / W), the last ranks
    fewer or none, and gets the rows of all ranks' tokens for them; every rank must call. A token that needs several
    experts of one rank travels there once. Rows of one expert stand in the order of ranks, then of slots, as on one
    rank that has all tokens, and capacity drops what it would drop there.

    mode "exact" exchanges the counts first and reads them, the only host synchronisation: R is then known to the host,
    of unbacked size under torch.compile. "bounded" gives each rank room for rows_per_peer tokens of each: shapes are
    static, nothing waits for the device, and rows from offsets[E_local] on are zeros. What ranks must agree on is
    compared in exact mode, and on a CPU, outside torch.compile, in bounded mode and by combine.

    Args:
        x: [T, H], as permute takes it. With a group T may differ between ranks, in bounded mode only where
            rows_per_peer is given.
        experts, num_experts, capacity, drop_policy: as plan takes them.
        weights: as plan takes them. With a group they travel along and combine needs none.
        group: the process group to exchange rows with, or a DeviceMesh of one dimension. None: no exchange.
        mode: "exact" or "bounded"; this and what follows is for a group only.
        rows_per_peer: of bounded mode, the same on every rank; None: T, which is always enough. Further rows are
            dropped and counted in plan.dropped.
        name: of the layer, in errors of the exchange.

    Returns:
        (rows [R, H], plan): a Plan, with a group an ExpertParallelPlan.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; ranks disagree.
        RuntimeError: the exchange failed: a rank died, or did not answer within the timeout of the group.
    """
    checks.no_tangents("dispatch", x)
    checks.copied("dispatch", "x", x)
    policy = checks.option("dispatch", "drop_policy", drop_policy, checks.DROP_POLICIES)
    checks.plan("dispatch", experts, num_experts, capacity, policy, weights)
    checks.dispatch(x, experts)
    exchange.check("dispatch", mode, rows_per_peer, name, grouped=group is not None)
    if not torch.compiler.is_compiling():
        checks.slots("dispatch", "experts", experts.numel())
    if group is not None:
        return exchange.dispatch(
            x, experts, num_experts, capacity, drop_policy, weights, group, mode, rows_per_peer, name
        )
    plan = Plan(*torch.ops.moe_ops.plan(experts, num_experts, capacity, policy, weights))
    return call(torch.ops.moe_ops.permute, x, plan.row_slot, plan.slot_row), plan


def combine(rows: Tensor, weights: Tensor | None, plan: Plan | ExpertParallelPlan) -> Tensor:
    """Sums each token's rows: y[t] = sum over k of weights[t, k] * rows[plan.slot_row[t, k]].

    Dropped slots count nothing. Sums in float32 (float64 for float64) in the order of k and rounds once. With the plan
    of a dispatch over a group, every rank sums what it has of a token, rounds, and sends that back; the sum of those
    is rounded again.

    Args:
        rows: [R, H], any float dtype.
        weights: [T, K], any float dtype; None: a plain sum, or with the weights that dispatch was given with a group.
        plan: of the same R rows.

    Returns:
        [T, H], the dtype of rows.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the exchange failed.
    """
    if isinstance(plan, ExpertParallelPlan):
        return exchange.combine(rows, weights, plan)
    return ops.combine(rows, weights, plan)


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor | None,
    w_in: Tensor | PackedWeight,
    w_out: Tensor | PackedWeight,
    *,
    activation: str = "silu",
    gated: bool = True,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    layout: str = "concatenated",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    weight_on: str = "output",
    capacity: int | None = None,
    drop_policy: str = "position",
    plan: Plan | None = None,
) -> Tensor:
    """Applies the experts' feed-forward layers: y[t] = sum over k of weights[t, k] * mlp of experts[t, k] (x[t]).

    mlp(x) = inner @ w_out[e].T + b_out[e], where inner = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)
    and [gate, up] = x @ w_in[e].T + b_in[e]; plain (gated=False): inner = act(min(x @ w_in[e].T + b_in[e], limit)).
    Shazeer 2020 (arXiv:2002.05202); the clamped form is GPT-OSS's: silu, alpha=1.702, limit=7, up_offset=1,
    interleaved.

    No permuted copy of x is stored. For backward x and the pre-activation [R, 2I] ([R, I] when plain) are kept, beside
    the arguments and the plan; the pre-activation is written only when a gradient will be needed. Sums in float32
    (float64 for float64), on CUDA in TF32 where torch's switch allows it; inner is rounded once to the dtype of x.
    Under autocast x goes to the autocast dtype.

    Args:
        x: [T, H], any float dtype.
        weights: [T, K], any float dtype.
        experts: [T, K] int32 or int64; ids outside 0..E-1 are dropped slots. May be None where a plan is given.
        w_in: [E, 2I, H], or [E, I, H] when plain; the dtype of x, or float32 under bfloat16 and float16 (rounded to the
            dtype of x; the gradient is float32).
        w_out: [E, H, I], dtype as w_in. Where no gradient is needed, w_in, w_out or both may be a PackedWeight in the
            dtype of x (see prepack).
        activation: "silu" (z * sigmoid(alpha * z)), "gelu", "gelu_tanh", "relu" or "relu2" (relu squared).
        gated: whether w_in holds gates and ups.
        b_in: [E, 2I] or [E, I], dtype as w_in.
        b_out: [E, H], dtype as w_in.
        layout: "concatenated": all gates stand before all ups; "interleaved": they alternate. Ignored when plain.
        alpha: of silu.
        limit: clamps the gate from above and the up from both sides; None: no limit.
        up_offset: added to the up.
        weight_on: "output": weights multiply the experts' outputs; "input": the experts' inputs (Llama 4).
        capacity, drop_policy: as plan takes them; "probability" reads weights.
        plan: of these tokens; supersedes experts, and capacity must then be None.

    Returns:
        [T, H], the dtype of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
        RuntimeError: a weight is packed and a gradient is needed.
    """
    options = (activation, layout, alpha, limit, up_offset, weight_on, drop_policy)
    given = (x, weights, experts, w_in, w_out, b_in, b_out)
    if plan is None and capacity is None and is_plain_inference(given) and not autocast.is_enabled():
        try:
            return _inference(*given, gated, options)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            try:
                _checked(*given, gated, options)
            except (TypeError, ValueError) as named:
                raise named from None  # an argument was refused: this names it
            raise
    checks.no_tangents("moe_mlp", x, weights, w_in, w_out, b_in, b_out)
    x, w_in, w_out, b_in, b_out = autocast.operands(x, w_in, w_out, b_in, b_out)
    act, interleaved, alpha, bound, up_offset, weight_on_input, policy = _checked(
        x, weights, experts, w_in, w_out, b_in, b_out, gated, options, capacity, plan
    )
    (weight_in, panels_in), (weight_out, panels_out) = operand(w_in), operand(w_out)
    if plan is None:
        ranks = weights if policy == checks.DROP_POLICIES["probability"] else None
        offsets, row_slot, slot_row, _ = torch.ops.moe_ops.plan(experts, weight_in.shape[0], capacity, policy, ranks)
    else:
        offsets, row_slot, slot_row, _ = plan
    operands = (x, weights, weight_in, weight_out, b_in, b_out)
    packing.no_gradient("moe_mlp", "w_in", panels_in, *operands)
    packing.no_gradient("moe_mlp", "w_out", panels_out, *operands)
    keep_pre = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    y: Tensor
    y, _ = call(
        torch.ops.moe_ops.moe_mlp, x, weights, weight_in, weight_out, b_in, b_out, offsets, row_slot, slot_row, act,
        gated, interleaved, alpha, bound, up_offset, weight_on_input, numerics.allow_tf32(x),
        numerics.is_batch_invariant(), keep_pre, panels_in, panels_out,
    )  # fmt: skip
    return y


def _inference(
    x: Tensor,
    weights: Tensor,
    experts: Any,
    w_in: Tensor | PackedWeight,
    w_out: Tensor | PackedWeight,
    b_in: Tensor | None,
    b_out: Tensor | None,
    gated: bool,
    options: tuple[Any, ...],
) -> Tensor:
    """moe_mlp as one operator, which alone checks the tensors.

    Between two calls the weights displace this code and its objects from the caches, so that every line costs misses:
    the way is kept short.
    """
    panels_in = panels_out = None
    if isinstance(w_in, PackedWeight):
        w_in, panels_in = operand(w_in)
    if isinstance(w_out, PackedWeight):
        w_out, panels_out = operand(w_out)
    act, interleaved, alpha, bound, up_offset, weight_on_input, _ = _cached_options(gated, x.dtype, *options)
    y: Tensor = without_autograd(
        _moe_mlp_inference, x, weights, experts, w_in, w_out, b_in, b_out, act, gated, interleaved, alpha, bound,
        up_offset, weight_on_input, numerics.allow_tf32(x), numerics.is_batch_invariant(), panels_in, panels_out,
    )  # fmt: skip
    return y


def _checked(
    x: Any,
    weights: Any,
    experts: Any,
    w_in: Any,
    w_out: Any,
    b_in: Any,
    b_out: Any,
    gated: Any,
    options: tuple[Any, ...],
    capacity: Any = None,
    plan: Any = None,
) -> Options:
    """The options of moe_mlp as its schema has them, when all arguments have been checked."""
    checks.flag("moe_mlp", "gated", gated)
    (weight_in, panels_in), (weight_out, panels_out) = operand(w_in), operand(w_out)
    packing.check_mlp(x, weights, weight_in, weight_out, gated, b_in, b_out, panels_in, panels_out)
    known = mlp_options("moe_mlp", x.dtype, *options)
    if plan is None:
        checks.mlp_experts(x, weights, weight_in, experts, capacity)
        return known
    checks.is_plan("moe_mlp", "plan", plan)
    if capacity is not None:
        raise ValueError(f"moe_mlp: capacity must be None where a plan is given, got {capacity}")
    checks.mlp_plan(weights, weight_in, plan.offsets, plan.row_slot, plan.slot_row)
    return known


@lru_cache(typed=True)  # True == 1.0, but is no alpha
def _cached_options(gated: Any, dtype: torch.dtype, *options: Any) -> Options:
    checks.flag("moe_mlp", "gated", gated)
    return mlp_options("moe_mlp", dtype, *options)


def mlp_options(
    op: str,
    dtype: torch.dtype,
    activation: Any,
    layout: Any,
    alpha: Any,
    limit: Any,
    up_offset: Any,
    weight_on: Any,
    drop_policy: Any,
) -> Options:
    """The options of moe_mlp as its schema has them; numbers must be finite in what products are summed in."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        checks.option(op, "activation", activation, checks.ACTIVATIONS),
        bool(checks.option(op, "layout", layout, checks.LAYOUTS)),
        checks.number(op, "alpha", alpha, dtype=compute),
        float("inf") if limit is None else checks.number(op, "limit", limit, positive=True, dtype=compute),
        checks.number(op, "up_offset", up_offset, dtype=compute),
        bool(checks.option(op, "weight_on", weight_on, checks.WEIGHT_ON)),
        checks.option(op, "drop_policy", drop_policy, checks.DROP_POLICIES),
    )
