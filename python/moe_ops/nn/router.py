"""Router: a linear layer in float32 and `moe_ops.route`, for every family of routers that route can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks, ops, reference
from moe_ops.nn.router_base import LinearRouter


class Router(LinearRouter):
    """Chooses top_k of num_experts for every token: `route(x @ weight.T + bias, top_k, ...)`.

    Args:
        hidden, num_experts, top_k, bias, jitter: as in `LinearRouter`.
        score, groups, group_score, group_mask, renormalize, eps, p, scale, softcap: as in `moe_ops.route`.
        expert_scale: learns a factor per expert (`expert_scale` [num_experts], ones at first) on the route weights.
        correction_bias: keeps a buffer `selection_bias` [num_experts], float32 whatever the module is cast to, that is
            added to the scores for the choice only and moved by `update_bias` (Wang et al. 2024,
            "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv:2408.15664) or, at every step of
            an optimizer, by `LossFreeBalancing`.

    DeepSeek-V3 (arXiv:2412.19437) is score="sigmoid", groups=(8, 4), renormalize=True, scale=2.5, correction_bias=True;
    DBRX renormalize="pnorm", p=1.
    """

    selection_bias: Tensor | None
    scores_by = "logits"

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
        super().__init__(hidden, num_experts, top_k, bias=bias, jitter=jitter, device=device, dtype=dtype)
        module_checks.flags(type(self).__name__, expert_scale=expert_scale, correction_bias=correction_bias)
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
        self.expert_scale = None
        if expert_scale:
            self.expert_scale = torch.nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype))
        selection_bias = torch.empty(num_experts, device=device, dtype=torch.float32) if correction_bias else None
        self.register_buffer("selection_bias", selection_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew; biases become zero and expert scales one."""
        super().reset_parameters()
        if self.expert_scale is not None:
            torch.nn.init.ones_(self.expert_scale)
        if self.selection_bias is not None:
            self.selection_bias.zero_()

    def set_top_k(self, top_k: int) -> None:
        """Another top_k from now on; with groups, no more than those that are kept hold."""
        ops.route(torch.empty(0, self.num_experts, device="cpu"), top_k, **self.options)
        self.top_k = top_k

    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        options = {**self.options, "selection_bias": self.selection_bias, "expert_scale": self.expert_scale}
        return ops.route(self.logits(x), self.top_k, **options, **statistics)

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """As in RouterBase, from logits [tokens, num_experts]."""
        names = ("score", "renormalize", "eps", "p", "scale", "softcap")
        options = {name: self.options[name] for name in names}
        return reference.weigh(scores, experts, expert_scale=self.expert_scale, **options)

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """One step of loss-free balancing (Wang et al. 2024, algorithm 1): bias += rate · sign(mean(counts) - counts).

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
        return f"{super().extra_repr()}, {options}"
