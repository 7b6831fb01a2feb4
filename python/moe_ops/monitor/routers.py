"""What of a model chooses experts, and how often each was chosen."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from moe_ops import ops
from moe_ops.nn.router_base import RouterBase


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every router of moe_ops.nn, of an MoE, a Cascade or alone, by its name in the model."""
    return {name or "router": m for name, m in model.named_modules() if isinstance(m, RouterBase)}


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
