"""What of a model chooses experts."""

from __future__ import annotations

import inspect

import torch

from moe_ops import nn

LISTENERS = "_moe_ops_listeners"


def routers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Every router of moe_ops.nn, in a layer or alone, by its name in the model."""
    return {name or "router": m for name, m in model.named_modules() if isinstance(m, nn.RouterBase)}


def foreign_experts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The experts modules of transformers, which are told the choice: forward(hidden_states, top_k_index, ...)."""

    def told(module: torch.nn.Module) -> bool:
        return "top_k_index" in inspect.signature(type(module).forward).parameters

    ours = replaced(model)
    named = model.named_modules()
    known = {name: m for name, m in named if isinstance(getattr(m, "num_experts", None), int) and told(m)}
    return {name: module for name, module in known.items() if name not in ours}


def replaced(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """What `integrations.transformers.replace` put into a model: it tells its LISTENERS which experts it applies."""
    return {name: m for name, m in model.named_modules() if LISTENERS in vars(m)}
