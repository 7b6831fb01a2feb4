"""Experts that a model keeps in pieces, in one tensor per product; each is built from the module it takes the place of.

w_in is [E, 2I, H] (gate, then up) or [E, I, H], w_out [E, H, I].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import functional
from moe_ops.integrations.transformers import choice, experts, gates


class Stacked(torch.nn.Module):
    """w_in, w_out and their biases, an activation, and dropout after it and after the experts."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None

    def __init__(self, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, act: Any) -> None:
        super().__init__()
        for name, value in {"w_in": w_in, "w_out": w_out, "b_in": b_in, "b_out": b_out}.items():
            self.register_parameter(name, None if value is None else torch.nn.Parameter(value))
        setattr(self, choice.LISTENERS, [])
        self.act_fn, self.dropout, self.token_dropout = act, 0.0, 0.0

    def apply_experts(self, x: Tensor, weights: Tensor, ids: Tensor, gated: bool) -> Tensor:
        choice.tell(self, ids, len(self.w_in))
        said = gates.of_activation(self, "act_fn")
        drops = self.training and (self.dropout > 0 or self.token_dropout > 0)
        if said is not None and not drops:
            options: dict[str, Any] = {**dict(said), "gated": gated, "b_in": self.b_in, "b_out": self.b_out}
            return functional.moe_mlp(x, weights, ids, self.w_in, self.w_out, **options)

        def between(pre: Tensor) -> Tensor:
            gate, up = pre.chunk(2, dim=-1) if gated else (pre, 1)
            inner = self.act_fn(gate) * up
            return torch.nn.functional.dropout(inner, self.dropout, self.training)

        def after(rows: Tensor) -> Tensor:
            return torch.nn.functional.dropout(rows, self.token_dropout, self.training)

        return experts.two_products(x, weights, ids, self.w_in, self.w_out, self.b_in, self.b_out, between, after)


class Dbrx(Stacked):
    """DbrxExperts: w1 (gate), v1 (up) and w2 are [E * I, H]."""

    def __init__(self, old: Any) -> None:
        glu = old.mlp
        shape = (-1, old.ffn_hidden_size, old.hidden_size)
        w1, v1, w2 = (weight.detach().view(shape) for weight in (glu.w1, glu.v1, glu.w2))
        super().__init__(torch.cat([w1, v1], dim=1), w2.transpose(1, 2), None, None, glu.activation_fn)
        self.requires_grad_(glu.w1.requires_grad).train(old.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self.apply_experts(x, top_k_weights, top_k_index, gated=True).view(hidden_states.shape)


class Switch(Stacked):
    """SwitchTransformersExperts: a Linear pair per expert."""

    def __init__(self, old: Any) -> None:
        first = old["expert_0"]
        super().__init__(_stack(old, "wi"), _stack(old, "wo"), None, None, first.act)
        self.dropout = first.dropout.p
        self.requires_grad_(first.wi.weight.requires_grad).train(old.training)

    def forward(self, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor) -> Tensor:
        """selected_experts [T, 1, E] is one-hot, or zero where the token is over capacity."""
        ids = selected_experts.argmax(dim=-1).masked_fill(selected_experts.sum(dim=-1) == 0, -1)
        return self.apply_experts(hidden_states, routing_weights, ids, gated=False)


class Nllb(Stacked):
    """NllbMoeExperts: a Linear pair with biases per expert.

    transformers 5.24 takes the one-hot mask [T, E] for ids, so that every first choice goes to expert 1 and every
    second one to expert 0. This computes the same.
    """

    def __init__(self, old: Any) -> None:
        first = old["expert_0"]
        b_in, b_out = _stack(old, "fc1", "bias"), _stack(old, "fc2", "bias")
        super().__init__(_stack(old, "fc1"), _stack(old, "fc2"), b_in, b_out, first.act)
        self.dropout, self.token_dropout = first.dropout.p, old.moe_token_dropout
        self.requires_grad_(first.fc1.weight.requires_grad).train(old.training)

    def forward(self, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        weights, at = router_probs.topk(min(2, router_probs.shape[-1]), dim=-1)  # at most two are not zero
        ids = router_mask.gather(1, at).long().masked_fill(weights == 0, -1)
        y = self.apply_experts(hidden_states, weights, ids, gated=False)
        return y if self.training else y * (1 - self.token_dropout)


def _stack(old: Any, layer: str, name: str = "weight") -> Tensor:
    """[E, ...] from one Linear of each expert."""
    values = [getattr(getattr(old[f"expert_{e}"], layer), name) for e in range(old.num_experts)]
    return torch.stack([value.detach() for value in values])
