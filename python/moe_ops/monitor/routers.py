"""What of a model chooses experts, and how often each was chosen."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from moe_ops import nn, ops


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every router of a moe_ops.nn.MoE, and routers that stand alone, by their names in the model."""
    within = {id(m.router) for m in model.modules() if isinstance(m, nn.MoE)}
    found = model.named_modules()
    return {name or "router": m for name, m in found if id(m) in within or isinstance(m, nn.Router)}


def foreign_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The experts modules of transformers, which are told the choice: forward(hidden_states, top_k_index, ...)."""

    def told(module: torch.nn.Module) -> bool:
        return "top_k_index" in inspect.signature(type(module).forward).parameters

    named = model.named_modules()
    return {name: m for name, m in named if isinstance(getattr(m, "num_experts", None), int) and told(m)}


def count(experts: Tensor, num_experts: int, segments: Tensor | None = None, num_segments: int = 1) -> Tensor:
    """[num_segments, num_experts] int32, slots per expert; ids outside 0..E-1 and other segments count nowhere."""
    if segments is not None:
        known = (segments >= 0) & (segments < num_segments)
        first = (torch.where(known, segments, 0) * num_experts).to(experts.dtype)  # [T]
        valid = known.unsqueeze(1) & (experts >= 0) & (experts < num_experts)
        experts = torch.where(valid, experts + first.unsqueeze(1), -1)
    counts: Tensor = ops.plan(experts, num_segments * num_experts).counts
    return counts.view(num_segments, num_experts)
