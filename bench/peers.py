"""The layer as one would write it without moe_ops: a loop over experts, torch's grouped_mm, transformers, and dense.

The loop in float64 is also what every variant is checked against. Expert weights are w_in [E, 2I or I, H] (gate rows
first) and w_out [E, H, I].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shapes import Shape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def activate(pre: Tensor, shape: Shape) -> Tensor:
    act = ACTIVATIONS[shape.activation]
    if not shape.gated:
        return act(pre)
    gate, up = pre.chunk(2, dim=-1)
    return act(gate) * up


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a router computes in, and its weights come in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, the top_k largest, renormalised: weights [T, K], experts [T, K]."""
    weights, experts = torch.topk(torch.softmax(logits, dim=-1, dtype=compute_dtype(logits.dtype)), top_k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), experts


def route_in_groups(
    logits: Tensor, top_k: int, bias: Tensor, groups: int, top_groups: int, choose_by: Tensor | None = None
) -> Tensor:
    """The weights of DeepSeek-V3's router: sigmoid; bias for the choice alone; experts of the groups whose two largest
    sum to most. choose_by: logits that make the choice in place of `logits`.
    """
    scores = torch.sigmoid(logits.to(compute_dtype(logits.dtype)))
    with torch.no_grad():
        choice = (scores if choose_by is None else torch.sigmoid(choose_by.to(bias.dtype))) + bias
        by_group = choice.unflatten(1, (groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(dim=-1).topk(top_groups, dim=-1).indices
        outside = torch.ones_like(by_group[:, :, 0], dtype=torch.bool).scatter(1, best, False)
        chosen = by_group.masked_fill(outside[:, :, None], -torch.inf).flatten(1).topk(top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)


def plan(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """offsets [E + 1] and the slot of each row [R], rows sorted by expert."""
    flat = experts.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    return F.pad(counts.cumsum(0), (1, 0)).int(), flat.argsort(stable=True)


def inverse(row_slot: Tensor) -> Tensor:
    """The row of each slot [R]."""
    slot_row = torch.empty_like(row_slot)
    slot_row[row_slot] = torch.arange(len(row_slot), dtype=row_slot.dtype)
    return slot_row


def loop_gemm(rows: Tensor, w: Tensor, bounds: list[int]) -> Tensor:
    """rows [R, K] of expert e by w[e] [N, K], one expert after the other; bounds are the offsets, on the host."""
    parts = [
        F.linear(rows[a:b], matrix.to(rows.dtype))
        for a, b, matrix in zip(bounds[:-1], bounds[1:], w.unbind(), strict=True)
    ]
    return torch.cat(parts)


def loop_experts(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor, shape: Shape) -> Tensor:
    """One expert after the other, on the tokens that chose it. Computes in the dtype of x."""
    y = torch.zeros_like(x)
    for expert, (expert_in, expert_out) in enumerate(zip(w_in.unbind(), w_out.unbind(), strict=True)):
        token, k = torch.where(experts == expert)
        if not len(token):
            continue
        inner = activate(F.linear(x[token], expert_in.to(x.dtype)), shape)
        rows = F.linear(inner, expert_out.to(x.dtype)) * weights[token, k, None]
        y.index_add_(0, token, rows.to(y.dtype))
    return y


def grouped_mm_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor, shape: Shape
) -> Tensor:
    """Rows sorted by expert, torch's grouped_mm twice, rows summed per token."""
    offsets, row_slot = plan(experts, len(w_in))
    rows = x[row_slot // shape.top_k]
    inner = activate(F.grouped_mm(rows, w_in.transpose(1, 2), offs=offsets[1:]), shape)
    rows = F.grouped_mm(inner, w_out.transpose(1, 2), offs=offsets[1:])
    by_slot = (rows * weights.flatten()[row_slot, None])[inverse(row_slot)]
    return by_slot.view(-1, shape.top_k, shape.hidden).sum(dim=1).to(x.dtype)


def transformers_experts(shape: Shape, w_in: Tensor, w_out: Tensor) -> Callable[..., Tensor]:
    """The experts of transformers' Mixtral block, eager, on the given weights; ImportError where not installed."""
    if not shape.gated:
        raise ImportError("Mixtral's experts are gated")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=1, intermediate_size=1, num_local_experts=1, hidden_act=shape.activation)
    config._experts_implementation = "eager"
    block: Any = MixtralExperts(config)
    del block.gate_up_proj, block.down_proj
    block.gate_up_proj, block.down_proj = w_in, w_out  # plain tensors, so that gradients flow to the caller's
    block.num_experts, block.hidden_dim, block.intermediate_dim = shape.experts, shape.hidden, shape.inner
    return lambda x, weights, experts, *_: block(x, experts, weights)


def vllm_experts(shape: Shape) -> Callable[..., Tensor]:
    """vLLM's Triton kernels, forward only."""
    if shape.activation != "silu" or not shape.gated:
        raise ImportError("used with SwiGLU only")
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda x, weights, experts, w_in, w_out, _: fused_experts(x, w_in, w_out, weights.float(), experts.int())


RIVALS: dict[str, Callable[[Shape], Callable[..., Tensor]]] = {"vLLM fused_experts": vllm_experts}


def dense(x: Tensor, w_in: Tensor, w_out: Tensor, shape: Shape) -> Tensor:
    """A feed-forward layer of the same FLOPs: w_in [K * (2I or I), H], w_out [H, K * I]."""
    return F.linear(activate(F.linear(x, w_in), shape), w_out)
