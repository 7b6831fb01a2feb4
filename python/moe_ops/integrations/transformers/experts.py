"""The experts function: what transformers calls in the place of an experts module's own forward.

Expert weights come as [E, 2I, H] and [E, H, I] (has_gate) or [E, I, H] and [E, H, I], or transposed in their last two
dimensions (is_transposed); ids at or above num_experts, which transformers' expert parallelism gives to the slots of
other ranks, are dropped slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, functional, ops
from moe_ops.integrations.transformers import gates

HALVES = (torch.bfloat16, torch.float16)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Applies a transformers experts module with moe_ops; registered as "moe_ops" by `enable`.

    Float32 weights under a bfloat16 or float16 model are rounded as moe_mlp does; under any other difference the tokens
    go to the weights' dtype.

    Args:
        hidden_states: [T, H].
        top_k_index: [T, K] int64.
        top_k_weights: [T, K], any float dtype.

    Returns:
        [T, H], the dtype of hidden_states.
    """
    w_in = self.gate_up_proj if self.has_gate else self.up_proj
    w_out = self.down_proj
    if self.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    b_in = b_out = None
    if self.has_bias:
        b_in, b_out = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias, self.down_proj_bias
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    if w_in.dtype != x.dtype and not (w_in.dtype == torch.float32 and x.dtype in HALVES) and not _autocast(x):
        x = x.to(w_in.dtype)
    ids, weights = (value.reshape(x.shape[0], -1) for value in (top_k_index, top_k_weights))
    after = self.post_expert_norm if self.has_post_expert_norm else None
    options = gates.options(self, self.has_gate) if after is None else None
    if options is not None:
        y = functional.moe_mlp(x, weights, ids, w_in, w_out, b_in=b_in, b_out=b_out, **dict(options))
    else:
        between = self._apply_gate if self.has_gate else self.act_fn
        y = two_products(x, weights, ids, w_in, w_out, b_in, b_out, between, after)
    return y.reshape(hidden_states.shape).to(hidden_states.dtype)


def two_products(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    between: Callable[[Tensor], Tensor],
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Experts with any function between their products and after them: y[t] = sum of weights[t, k] * after(...).

    Rows of dropped slots are zero before `between`; whatever it makes of them is not summed.
    """
    plan = ops.plan(ids, w_in.shape[0])
    pre = ops.grouped_gemm(x, w_in, plan.offsets, bias=b_in, gather=plan)
    rows = ops.grouped_gemm(between(pre).to(pre.dtype), w_out, plan.offsets, bias=b_out)
    return ops.combine(rows if after is None else after(rows), weights, plan)


def _autocast(x: Tensor) -> bool:
    """Whether the operators themselves bring x to the dtype of its products."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype in checks.FLOATS
