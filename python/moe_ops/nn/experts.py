"""Experts: the weights of E small networks in two stacked tensors, applied by `moe_ops.moe_mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops import autocast, checks, functional, module_checks, packing, reference
from moe_ops.expert_parallel.sharding import each_expert
from moe_ops.types import PackedWeight, Plan

IMPLS = {"moe_ops": 0, "naive": 1}


class Experts(torch.nn.Module):
    """num_experts feed-forward networks, hidden -> inner -> hidden, of which every token sees those it is routed to.

    A call is plan, permute, grouped_gemm, activation, grouped_gemm, combine, fused: see `moe_ops.moe_mlp`.

    Args:
        num_experts, hidden, inner: sizes; w_in is [num_experts, 2 * inner, hidden] (gate rows, then up rows;
            [num_experts, inner, hidden] when not gated) and w_out [num_experts, hidden, inner].
        activation, gated, layout, alpha, limit, up_offset, weight_on: as in `moe_ops.moe_mlp`.
        bias: adds learned biases b_in [num_experts, 2 * inner or inner] and b_out [num_experts, hidden].
        impl: "moe_ops" for the fused operators, "naive" for `moe_ops.reference`, the same formula in plain PyTorch.

    Every expert starts as `torch.nn.Linear` would: weights uniform within 1/sqrt(fan-in), drawn from torch's generator;
    biases start at zero.
    """

    w_in: Any  # a parameter, or a PackedWeight
    w_out: Any

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        inner: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        layout: str = "concatenated",
        alpha: float = 1.0,
        limit: float | None = None,
        up_offset: float = 0.0,
        weight_on: str = "output",
        impl: str = "moe_ops",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        module_checks.sizes("Experts", num_experts=num_experts, hidden=hidden, inner=inner)
        checks.option("Experts", "activation", activation, checks.ACTIVATIONS)
        module_checks.flags("Experts", gated=gated, bias=bias)
        checks.option("Experts", "layout", layout, checks.LAYOUTS)
        checks.number("Experts", "alpha", alpha)
        if limit is not None:
            checks.number("Experts", "limit", limit, positive=True)
        checks.number("Experts", "up_offset", up_offset)
        checks.option("Experts", "weight_on", weight_on, checks.WEIGHT_ON)
        checks.option("Experts", "impl", impl, IMPLS)
        module_checks.parameters("Experts", dtype)
        self.num_experts, self.hidden, self.inner = num_experts, hidden, inner
        self.activation, self.gated, self.layout = activation, gated, layout
        self.alpha, self.limit, self.up_offset = alpha, limit, up_offset
        self.weight_on, self.impl = weight_on, impl

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(self._empty(shape, device, dtype))

        pre = 2 * inner if gated else inner
        self.w_in = parameter(num_experts, pre, hidden)
        self.w_out = parameter(num_experts, hidden, inner)
        self.b_in = parameter(num_experts, pre) if bias else None
        self.b_out = parameter(num_experts, hidden) if bias else None
        self.reset_parameters()

    def _empty(self, shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> Tensor:
        """Memory for a weight [num_experts, ...]."""
        return torch.empty(shape, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the weights anew; biases become zero."""
        for weight in (self.w_in, self.w_out):
            if isinstance(weight, PackedWeight):
                raise RuntimeError("Experts: weights that were prepacked cannot be drawn anew")
            bound = weight.shape[-1] ** -0.5
            for expert in each_expert(weight.detach()):
                torch.nn.init.uniform_(expert, -bound, bound)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                torch.nn.init.zeros_(bias)

    def prepack(self, *, dtype: torch.dtype | None = None) -> Experts:
        """Packs the weights for inference on the CPU, in place; returns self.

        w_in and w_out become PackedWeights (see `moe_ops.prepack`) of about their memory. They are parameters no more:
        load or save the state before, and call the module under torch.no_grad().

        Args:
            dtype: rounds to this dtype first: that of the tokens. None: the weights' own.
        """
        if self.impl != "moe_ops":
            raise ValueError(f"Experts: impl must be 'moe_ops' to prepack, got {self.impl!r}")
        for name in ("w_in", "w_out"):
            weight = getattr(self, name)
            if not isinstance(weight, PackedWeight):
                delattr(self, name)
                setattr(self, name, packing.prepack(weight, dtype=dtype))
        return self

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        *,
        capacity: int | None = None,
        drop_policy: str = "position",
        plan: Plan | None = None,
    ) -> Tensor:
        """y[t] = sum over k of weights[t, k] · expert experts[t, k] of x[t].

        Args:
            x: tokens [tokens, hidden].
            weights, experts: [tokens, top_k], as a Router returns them.
            capacity, drop_policy: rows per expert, and which slots are dropped beyond it, as in `moe_ops.plan`.
            plan: a plan of these experts made before; it supersedes experts and capacity.

        Returns:
            y [tokens, hidden] in x's dtype.
        """
        moe_mlp: Callable[..., Tensor]
        if self.impl == "moe_ops":
            moe_mlp = functional.moe_mlp
        else:
            moe_mlp = reference.moe_mlp
            (x,) = autocast.operands(x)
            checks.moe_mlp(x, weights, self.w_in, self.w_out, self.gated, self.b_in, self.b_out)
            checks.mlp_choice(x, weights, self.w_in, experts, capacity, drop_policy, plan)
        return moe_mlp(
            x,
            weights,
            experts,
            self.w_in,
            self.w_out,
            activation=self.activation,
            gated=self.gated,
            b_in=self.b_in,
            b_out=self.b_out,
            layout=self.layout,
            alpha=self.alpha,
            limit=self.limit,
            up_offset=self.up_offset,
            weight_on=self.weight_on,
            capacity=capacity,
            drop_policy=drop_policy,
            plan=plan,
        )

    def extra_repr(self) -> str:
        kind = f"activation={self.activation!r}, gated={self.gated}, bias={self.b_in is not None}, impl={self.impl!r}"
        return f"num_experts={self.num_experts}, hidden={self.hidden}, inner={self.inner}, {kind}"
