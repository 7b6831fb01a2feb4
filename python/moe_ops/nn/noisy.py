"""NoisyTopKRouter: learned noise on the scores, and the smooth load that its loss needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import ops, reference
from moe_ops.nn.router_base import LinearRouter, linear
from moe_ops.types import NoisyRouteResult


class NoisyTopKRouter(LinearRouter):
    """Top-k of noisy logits, weighed by their softmax (Shazeer et al. 2017, "Outrageously Large Neural Networks").

    H(x) = x @ weight.T + N(0, 1) · softplus(x @ noise_weight.T), equation 4; weights are the softmax over the top_k
    largest of H, equation 3. The noise is there in training only. With stats=True the result is a NoisyRouteResult:
    RouteResult and load, for `losses.load`; `losses.importance` takes its weights and experts.

    Args:
        hidden, num_experts, top_k, bias, jitter: as in `LinearRouter`; noise_weight is [num_experts, hidden].

    noise_weight starts at zero, a deviation of log 2; `init.even_` has the paper's beginning of weight as well.
    """

    scores_by = "noisy_logits"

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden, num_experts, top_k, bias=bias, jitter=jitter, device=device, dtype=dtype)
        self.noise_weight = torch.nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew; noise_weight and the bias become zero."""
        super().reset_parameters()
        torch.nn.init.zeros_(self.noise_weight)

    def noisy_logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits without noise, H(x), and the noise's deviation (None in evaluation), all [tokens, num_experts]."""
        x = self.seen(x)
        clean = linear(x, self.weight, self.bias)
        if not self.training:
            return clean, clean, None
        deviation = torch.nn.functional.softplus(linear(x, self.noise_weight))
        return clean, clean + torch.randn_like(clean) * deviation, deviation

    def weigh(self, scores: tuple[Tensor, Tensor, Tensor | None], experts: Tensor) -> Tensor:
        """As in RouterBase, from what noisy_logits returns; its noise is drawn anew in every call."""
        return reference.weigh(scores[1], experts, score="softmax_selected")

    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        clean, noisy, deviation = self.noisy_logits(x)
        result: Any = ops.route(noisy, self.top_k, score="softmax_selected", **statistics)
        if not statistics["stats"]:
            return result
        if deviation is None or self.top_k == self.num_experts:  # nothing is left to chance
            load = result.counts.sum(0).to(clean.dtype)
        else:
            load = _chance(clean, noisy, deviation, result.experts).sum(0)
        weights, experts, counts, mean_prob, logsumexp = result
        return NoisyRouteResult(weights, experts, counts, mean_prob, logsumexp, load)


def _chance(clean: Tensor, noisy: Tensor, deviation: Tensor, experts: Tensor) -> Tensor:
    """[tokens, experts]: how probably an expert stays, or comes, among the top_k when its own noise is drawn anew.

    Equations 8 and 9: an expert must beat the k-th largest of the others, the (k+1)-th of all if it is chosen itself.
    """
    top_k = experts.shape[1]
    largest = noisy.topk(top_k + 1, dim=1).values  # [tokens, top_k + 1]
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, experts.long(), True)
    to_beat = torch.where(chosen, largest[:, top_k:], largest[:, top_k - 1 : top_k])
    return torch.special.ndtr((clean - to_beat) / deviation.clamp(min=torch.finfo(deviation.dtype).tiny))
