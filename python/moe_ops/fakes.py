"""Shapes and dtypes of the operators' outputs without their values: what torch.compile and torch.export trace with.

An output that was not asked for is empty, of shape [0].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, packing
from moe_ops.types import lies_transposed


def register() -> None:
    """Registers every function below as the fake of the operator of its name."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"moe_ops::{name}", fake)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty(
    like: Tensor, shape: tuple[int, ...] | list[int], dtype: torch.dtype | None = None, asked: bool = True
) -> Tensor:
    return like.new_empty(shape if asked else (0,), dtype=dtype or like.dtype)


def _weight_grad(
    like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, asked: bool = True
) -> Tensor:
    _, n, k = shape
    if not (asked and transposed):
        return _empty(like, shape, dtype, asked)
    return like.new_empty_strided(shape, (n * k, 1, n), dtype=dtype)


def route(
    logits: Tensor,
    top_k: int,
    score: int,
    selection_bias: Tensor | None,
    expert_scale: Tensor | None,
    num_groups: int,
    top_groups: int,
    group_score: int,
    group_mask: int,
    renormalize: int,
    eps: float,
    p: float,
    scale: float,
    softcap: float,
    stats: bool,
    segments: Tensor | None,
    num_segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.route(logits, top_k, selection_bias, num_groups, top_groups, expert_scale, segments, num_segments)
    tokens, experts = logits.shape
    compute = compute_dtype(logits.dtype)
    return (
        _empty(logits, (tokens, top_k), compute),
        _empty(logits, (tokens, top_k), torch.int32),
        _empty(logits, (num_segments, experts), torch.int32, stats),
        _empty(logits, (num_segments, experts), compute, stats),
        _empty(logits, (tokens,), compute, stats),
    )


def route_backward(
    grad_weights: Tensor | None,
    grad_mean_prob: Tensor | None,
    grad_logsumexp: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    score: int,
    expert_scale: Tensor | None,
    renormalize: int,
    eps: float,
    p: float,
    scale: float,
    softcap: float,
    segments: Tensor | None,
    num_segments: int,
) -> tuple[Tensor, Tensor]:
    return (
        _empty(logits, logits.shape),
        _empty(logits, (logits.shape[1],), compute_dtype(logits.dtype), expert_scale is not None),
    )


def plan(
    experts: Tensor, num_experts: int, capacity: int | None, drop_policy: int, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.plan("plan", experts, num_experts, capacity, drop_policy, weights)
    tokens, top_k = experts.shape
    return (
        _empty(experts, (num_experts + 1,), torch.int32),
        _empty(experts, (tokens * top_k,), torch.int32),
        _empty(experts, (tokens, top_k), torch.int32),
        _empty(experts, (num_experts,), torch.int32),
    )


def permute(x: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    checks.permute(x, row_slot, slot_row)
    return _empty(x, (row_slot.shape[0], x.shape[1]))


def grouped_gemm(
    a: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    row_slot: Tensor | None,
    slot_row: Tensor | None,
    panels: Tensor | None,
    allow_tf32: bool,
    batch_invariant: bool,
) -> Tensor:
    checks.grouped_gemm(a, weight, offsets, bias, row_slot, slot_row)
    packing.check("grouped_gemm", "w", weight, panels, "a", a)
    rows = a.shape[0] if row_slot is None else row_slot.shape[0]
    return _empty(a, (rows, weight.shape[1]))


def grouped_gemm_weight_grad(
    grad: Tensor,
    a: Tensor,
    offsets: Tensor,
    row_slot: Tensor | None,
    width: int,
    dtype: torch.dtype,
    allow_tf32: bool,
    transposed: bool = False,
) -> Tensor:
    return _weight_grad(grad, (offsets.shape[0] - 1, grad.shape[1], a.shape[1]), dtype, transposed)


def grouped_gemm_weight_grad_(
    out: Tensor, grad: Tensor, a: Tensor, offsets: Tensor, row_slot: Tensor | None, width: int, allow_tf32: bool
) -> None:
    return None


def grouped_gemm_bias_grad(grad: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    return _empty(grad, (offsets.shape[0] - 1, grad.shape[1]), dtype)


def combine(rows: Tensor, weights: Tensor | None, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    checks.combine(rows, weights, row_slot, slot_row)
    return _empty(rows, (slot_row.shape[0], rows.shape[1]))


def combine_backward(
    grad_y: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    row_slot: Tensor,
    slot_row: Tensor,
    need_rows: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    return (
        _empty(grad_y, (row_slot.shape[0], grad_y.shape[1]), asked=need_rows),
        _empty(grad_y if weights is None else weights, slot_row.shape, asked=need_weights),
    )


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    offsets: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    up_offset: float,
    weight_on_input: bool,
    allow_tf32: bool,
    batch_invariant: bool,
    keep_pre: bool,
    panels_in: Tensor | None,
    panels_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    packing.check_mlp(x, weights, w_in, w_out, gated, b_in, b_out, panels_in, panels_out)
    checks.mlp_plan(weights, w_in, offsets, row_slot, slot_row)
    return _empty(x, x.shape), _empty(x, (row_slot.shape[0], w_in.shape[1]), asked=keep_pre)


def moe_mlp_inference(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    activation: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    up_offset: float,
    weight_on_input: bool,
    allow_tf32: bool,
    batch_invariant: bool,
    panels_in: Tensor | None,
    panels_out: Tensor | None,
) -> Tensor:
    packing.check_mlp(x, weights, w_in, w_out, gated, b_in, b_out, panels_in, panels_out)
    checks.mlp_experts(x, weights, w_in, experts, None)
    return _empty(x, x.shape)


def moe_mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    pre: Tensor,
    weights: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    offsets: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: int,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    up_offset: float,
    weight_on_input: bool,
    allow_tf32: bool,
    batch_invariant: bool,
    b_in_dtype: torch.dtype | None,
    need_x: bool,
    need_weights: bool,
    need_w_in: bool,
    need_w_out: bool,
    need_b_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        _empty(x, x.shape, asked=need_x),
        _empty(weights, weights.shape, asked=need_weights),
        _weight_grad(w_in, w_in.shape, w_in.dtype, lies_transposed(w_in), need_w_in),
        _weight_grad(w_out, w_out.shape, w_out.dtype, lies_transposed(w_out), need_w_out),
        _empty(w_in, w_in.shape[:2], b_in_dtype, b_in_dtype is not None),
        _empty(w_out if b_out is None else b_out, w_out.shape[:2], asked=need_b_out),
    )


FAKES: dict[str, Callable[..., Any]] = {
    "route": route,
    "route_backward": route_backward,
    "plan": plan,
    "permute": permute,
    "grouped_gemm": grouped_gemm,
    "grouped_gemm_weight_grad": grouped_gemm_weight_grad,
    "grouped_gemm_weight_grad_": grouped_gemm_weight_grad_,
    "grouped_gemm_bias_grad": grouped_gemm_bias_grad,
    "combine": combine,
    "combine_backward": combine_backward,
    "moe_mlp": moe_mlp,
    "moe_mlp_inference": moe_mlp_inference,
    "moe_mlp_backward": moe_mlp_backward,
}
