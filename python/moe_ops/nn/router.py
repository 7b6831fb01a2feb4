"""Router: a linear layer in float32 and `moe_ops.route`, for every family of routers that route can say."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from moe_ops import checks, module_checks, ops
from moe_ops.types import RouteResult


class Router(torch.nn.Module):
    """Chooses top_k of num_experts for every token: `route(x @ weight.T + bias, top_k, ...)`.

    The linear layer runs in float32 (float64 for float64 tokens or weights), also under autocast: a weight held in
    bfloat16 is upcast for the product, so near-ties between experts are not settled by rounding.

    Args:
        hidden, num_experts, top_k: sizes; weight is [num_experts, hidden].
        bias: adds a learned bias [num_experts] to the logits.
        score, groups, group_score, group_mask, renormalize, eps, p, scale, softcap: as in `moe_ops.route`.
        expert_scale: learns a factor per expert (`expert_scale` [num_experts], ones at first) on the route weights.
        correction_bias: keeps a buffer `selection_bias` [num_experts], float32 whatever the module is cast to, that is
            added to the scores for the choice only and moved by `update_bias` (Wang et al. 2024,
            "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts").
        jitter: in training, tokens are multiplied by uniform noise in [1 - jitter, 1 + jitter] before they are scored
            (Fedus et al. 2022, "Switch Transformers"); the experts still see the tokens as they are.

    The weight starts as that of `torch.nn.Linear`, uniform within 1/sqrt(hidden), drawn from torch's generator;
    the biases start at zero.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        score: str = "softmax",
        groups: tuple[int, int] | None = None,
        group_score: str = "top2_sum",
        group_mask: str = "-inf",
        renormalize: bool | str = False,
        eps: float = 1e-20,
        p: float = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
        expert_scale: bool = False,
        correction_bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        module_checks.sizes("Router", hidden=hidden, num_experts=num_experts)
        module_checks.flags("Router", bias=bias, expert_scale=expert_scale, correction_bias=correction_bias)
        if not 0 <= checks.number("Router", "jitter", jitter) < 1:
            raise ValueError(f"Router: jitter must be in [0, 1), got {jitter}")
        module_checks.parameters("Router", dtype)
        self.hidden, self.num_experts, self.top_k, self.jitter = hidden, num_experts, top_k, jitter
        self.options: dict[str, Any] = {
            "score": score,
            "groups": groups,
            "group_score": group_score,
            "group_mask": group_mask,
            "renormalize": renormalize,
            "eps": eps,
            "p": p,
            "scale": scale,
            "softcap": softcap,
        }
        # No tokens: route's own checks see the options here, not in the first forward.
        ops.route(torch.empty(0, num_experts, device="cpu"), top_k, **self.options)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.weight = parameter(num_experts, hidden)
        self.bias = parameter(num_experts) if bias else None
        self.expert_scale = parameter(num_experts) if expert_scale else None
        selection_bias = torch.empty(num_experts, device=device, dtype=torch.float32) if correction_bias else None
        self.register_buffer("selection_bias", selection_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew; biases become zero and expert scales one."""
        bound = self.hidden**-0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
        if self.expert_scale is not None:
            torch.nn.init.ones_(self.expert_scale)
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def logits(self, x: Tensor) -> Tensor:
        """The scores before route: x [..., hidden] -> [tokens, num_experts], float32 or float64."""
        module_checks.tokens("Router", x, self.hidden)
        checks.same_device("Router", "x", x, "weight", self.weight)
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        x = x.reshape(-1, self.hidden).to(dtype)
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        has_autocast = x.device.type != "meta"
        with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
            bias = None if self.bias is None else self.bias.to(dtype)
            return torch.nn.functional.linear(x, self.weight.to(dtype), bias)

    @overload
    def forward(
        self, x: Tensor, *, stats: Literal[False] = False, segments: Tensor | None = None, num_segments: int = 1
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, x: Tensor, *, stats: Literal[True], segments: Tensor | None = None, num_segments: int = 1
    ) -> RouteResult: ...

    def forward(
        self, x: Tensor, *, stats: bool = False, segments: Tensor | None = None, num_segments: int = 1
    ) -> tuple[Tensor, Tensor] | RouteResult:
        """Routes x [..., hidden], its leading dimensions flattened to tokens.

        Returns what `moe_ops.route` returns: (weights, experts), both [tokens, top_k], or with stats a RouteResult,
        whose counts, mean_prob and logsumexp are what the losses and `update_bias` need.
        """
        options = {**self.options, "selection_bias": self.selection_bias, "expert_scale": self.expert_scale}
        options |= {"stats": stats, "segments": segments, "num_segments": num_segments}
        result: tuple[Tensor, Tensor] | RouteResult = ops.route(self.logits(x), self.top_k, **options)
        return result

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """One loss-free balancing step (Wang et al. 2024): selection_bias += rate · sign(mean(counts) - counts).

        Args:
            counts: slots per expert of the last batch, [num_experts] or [segments, num_experts] as in RouteResult. With
                data parallelism, sum them over the ranks first.
            rate: the step; the paper uses 0.001 with sigmoid scores.
        """
        op = "Router.update_bias"
        if self.selection_bias is None:
            raise ValueError(f"{op}: the router must be built with correction_bias=True")
        module_checks.last_dim(op, "counts", counts, self.num_experts)
        checks.same_device(op, "counts", counts, "selection_bias", self.selection_bias)
        rate = checks.number(op, "rate", rate, dtype=torch.float32)
        load = counts.reshape(-1, self.num_experts).sum(0).to(self.selection_bias.dtype)
        self.selection_bias += rate * torch.sign(load.mean() - load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # A step of 0.001 is lost in bfloat16: the buffer follows the module's device, never its dtype.
        before = self.selection_bias
        super()._apply(fn, recurse)
        if before is not None and self.selection_bias is not None and self.selection_bias.dtype != torch.float32:
            self.selection_bias = before.to(self.selection_bias.device)
        return self

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"hidden={self.hidden}, num_experts={self.num_experts}, top_k={self.top_k}, {options}"
