"""SparseMixerRouter: sampled experts with an estimated gradient of the sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, ops
from moe_ops.nn.router_base import LinearRouter, segment_counts
from moe_ops.types import RouteResult


class SparseMixerRouter(LinearRouter):
    """SparseMixer (Liu et al. 2024, "GRIN: GRadient-INformed MoE", arXiv:2409.12136), the router of Phi-3.5-MoE.

    Experts are picked one after the other. For each pick, experts whose logit falls short of the best remaining one by
    more than 2 · threshold, relative to the larger magnitude, are left out; in training the expert is sampled from the
    softmax over the rest (Gumbel noise), else it is the best. Its weight is its probability in that softmax: weights do
    not sum to one. In training the weight of a sampled expert that is not the best is divided by about three (0.3333)
    three times out of four: Heun's third-order method, so that the gradient through the weight, which is that of the
    softmax without this factor, estimates the gradient of the sampling.

    Args:
        hidden, num_experts, top_k, bias, jitter: as in `LinearRouter`; Phi-3.5 has top_k=2.
        threshold: transformers calls it router_jitter_noise; 0.01 in Phi-3.5.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int = 2,
        *,
        threshold: float = 0.01,
        bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden, num_experts, top_k, bias=bias, jitter=jitter, device=device, dtype=dtype)
        self.threshold = checks.number("SparseMixerRouter", "threshold", threshold, positive=True)
        self.reset_parameters()

    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        logits = self.logits(x)
        remaining, weights, picks = logits, [], []
        for _ in range(self.top_k):
            weight, pick = self._pick(logits, remaining)
            weights.append(weight)
            picks.append(pick)
            remaining = remaining.scatter(1, pick, -torch.inf)
        experts = torch.cat(picks, 1).int()
        if not statistics["stats"]:
            return torch.cat(weights, 1), experts
        every: Any = ops.route(logits, self.top_k, **statistics)
        counts = segment_counts(experts, self.num_experts, statistics["segments"], statistics["num_segments"])
        return RouteResult(torch.cat(weights, 1), experts, counts, every.mean_prob, every.logsumexp)

    def _pick(self, logits: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the id, both [tokens, 1], of one more expert; remaining is -inf for those picked before."""
        with torch.no_grad():
            most, best = remaining.max(1, keepdim=True)
            too_small = (most - remaining) / logits.abs().clamp(min=most) > 2 * self.threshold
        near = remaining.masked_fill(too_small, -torch.inf)
        probability = near.softmax(1)
        if not self.training:
            return probability.gather(1, best), best
        pick = (near - torch.empty_like(near).exponential_().log()).argmax(1, keepdim=True)
        weight = probability.gather(1, pick)
        midpoint = (pick != best) & (torch.rand_like(most) <= 0.75)
        value = weight.detach() * torch.where(midpoint, 0.3333, 1.0)
        return value + (weight - weight.detach()), pick  # value, with the gradient of weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"
