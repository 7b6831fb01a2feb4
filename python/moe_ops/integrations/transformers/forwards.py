"""Forwards on the parameters that the models have, in the place of their own; `self` is the model's module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import functional, ops
from moe_ops.integrations.transformers import choice, experts, gates


def llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The block: the shared expert, and the top_k of each token, whose weights multiply their input."""
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)  # [T, E], zero where not chosen
    weights, ids = scores.topk(self.top_k, dim=-1)
    parts = self.experts
    choice.tell(self, ids, logits.shape[1])
    w_in, w_out = parts.gate_up_proj.transpose(1, 2), parts.down_proj.transpose(1, 2)
    said = _gated(parts)
    y = self.shared_expert(x)
    return y + functional.moe_mlp(x, weights, ids, w_in, w_out, weight_on="input", **said), logits


def longcat(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts: ids from num_routed_experts on are the identity, which is one factor per token."""
    choice.tell(self, top_k_index, self.total_experts)
    zero = top_k_index >= self.num_routed_experts
    factor = torch.where(zero, top_k_weights, torch.zeros_like(top_k_weights)).sum(dim=-1, keepdim=True)
    y = hidden_states * factor
    if self.gate_up_proj is not None:
        w_in = self.gate_up_proj[: self.num_routed_experts]
        routed = functional.moe_mlp(hidden_states, top_k_weights, top_k_index, w_in, self.down_proj, **_gated(self))
        y = y + routed
    return y.to(hidden_states.dtype)


def jetmoe(self: Any, layer_input: Tensor) -> Tensor:
    """The block of feed-forward experts. The router is called for what transformers records of it."""
    x = layer_input.reshape(-1, self.input_size)
    logits = self.router(x)[-1]
    weights, ids = ops.route(logits, self.router.top_k, score="softmax_selected")
    choice.tell(self, ids, logits.shape[1])
    said = _gated(self, "activation")
    y = functional.moe_mlp(x, weights, ids, self.input_linear.weight, self.output_linear.weight, **said)
    return y.view(layer_input.shape) + self.bias


def step3p7(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts, as a plug-in would be."""
    choice.tell(self, top_k_index, len(self.down_proj))
    said = gates.options(self, has_gate=True)
    operands = (hidden_states, top_k_weights, top_k_index, self.gate_up_proj, self.down_proj)
    if said is not None:
        return functional.moe_mlp(*operands, **dict(said))
    return experts.two_products(*operands, None, None, self._apply_gate)


def _gated(module: Any, act: str = "act_fn") -> dict[str, Any]:
    """The options of act(gate) * up; ValueError where moe_mlp does not have the activation."""
    said = gates.of_activation(module, act)
    if said is None:
        raise ValueError(f"transformers.replace: no activation of moe_mlp computes {getattr(module, act)}")
    return {**dict(said), "gated": True}
