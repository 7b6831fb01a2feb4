"""HierarchicalRouter: first a group of experts, then experts within it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks, ops, reference
from moe_ops.nn.router_base import LinearRouter, linear, segment_counts
from moe_ops.types import RouteResult

SCORES = {"softmax": 0, "softmax_selected": 1}


class HierarchicalRouter(LinearRouter):
    """Two gates: p(expert) = p(group) · p(expert | group) (Shazeer et al. 2017, appendix B, equation 12).

    Experts stand in num_groups equal runs. top_groups groups are chosen by the first gate, and in each of them
    top_k / top_groups experts by the second.

    Args:
        hidden, num_experts, top_k, bias, jitter: as in `LinearRouter`; weight [num_experts, hidden] is the second gate,
            group_weight [num_groups, hidden] the first. bias belongs to the second.
        groups: (num_groups, top_groups); num_groups divides num_experts, top_groups divides top_k.
        score: of both gates: "softmax" over all, or "softmax_selected", over the chosen (the paper's).

    Statistics: mean_prob is that of the product of both softmaxes over all experts, logsumexp that of the logits of
    both gates together. Experts stand by group, the best group first.
    """

    scores_by = "gates"

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        groups: tuple[int, int],
        *,
        score: str = "softmax",
        bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden, num_experts, top_k, bias=bias, jitter=jitter, device=device, dtype=dtype)
        op = "HierarchicalRouter"
        module_checks.pair(op, "groups", groups, "(num_groups, top_groups)")
        self.num_groups, self.top_groups = groups
        module_checks.sizes(op, num_groups=self.num_groups, top_groups=self.top_groups)
        if self.top_groups > self.num_groups or num_experts % self.num_groups or top_k % self.top_groups:
            raise ValueError(
                f"{op}: groups must be (a divisor of num_experts ({num_experts}), a divisor of top_k ({top_k}) that is "
                f"no larger), got {groups}"
            )
        if top_k // self.top_groups > num_experts // self.num_groups:
            held = num_experts // self.num_groups
            raise ValueError(f"{op}: groups must hold top_k / top_groups ({top_k // self.top_groups}), got {held} each")
        checks.option(op, "score", score, SCORES)
        self.score = score
        self.group_weight = torch.nn.Parameter(torch.empty(self.num_groups, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws both weights anew; the bias becomes zero."""
        super().reset_parameters()
        bound = self.hidden**-0.5
        torch.nn.init.uniform_(self.group_weight, -bound, bound)

    def set_top_k(self, top_k: int) -> None:
        """Refused: top_k is that of the groups."""
        raise ValueError(f"{type(self).__name__}: top_k must stay {self.top_k}, got {top_k}")

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of both gates: x [..., hidden] -> [tokens, groups], [tokens, groups, num_experts / groups]."""
        x = self.seen(x)
        by_group = (self.num_groups, self.num_experts // self.num_groups)
        return linear(x, self.group_weight), linear(x, self.weight, self.bias).unflatten(1, by_group)

    def weigh(self, scores: tuple[Tensor, Tensor], experts: Tensor) -> Tensor:
        """As in RouterBase, from what gates returns; experts of one group stand together."""
        of_group, of_expert = scores
        held, each = self.num_experts // self.num_groups, self.top_k // self.top_groups
        experts = experts.long().clamp(min=0).unflatten(1, (self.top_groups, each))
        group = experts[:, :, 0] // held  # [tokens, top_groups]
        inside = of_expert.gather(1, group.unsqueeze(2).expand(-1, -1, held)).flatten(0, 1)
        of_groups = reference.weigh(of_group, group, score=self.score)
        within = reference.weigh(inside, (experts % held).flatten(0, 1), score=self.score)
        return (of_groups.unsqueeze(2) * within.view(experts.shape)).flatten(1)

    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        held, each = self.num_experts // self.num_groups, self.top_k // self.top_groups
        of_group, of_expert = self.gates(x)
        group_weights, group = ops.route(of_group, self.top_groups, score=self.score)  # [tokens, top_groups]
        index = group.long().unsqueeze(2).expand(-1, -1, held)
        inside = of_expert.gather(1, index).flatten(0, 1)  # [tokens · top_groups, held]
        within, place = ops.route(inside, each, score=self.score)
        by_group = (-1, self.top_groups, each)
        weights = (group_weights.unsqueeze(2) * within.view(by_group)).flatten(1)
        experts = (group.unsqueeze(2) * held + place.view(by_group)).flatten(1)
        if not statistics["stats"]:
            return weights, experts
        product = of_group.log_softmax(1).unsqueeze(2) + of_expert.log_softmax(2)
        every: Any = ops.route(product.flatten(1), self.top_k, **statistics)
        logsumexp = torch.cat([of_group, of_expert.flatten(1)], 1).logsumexp(1)
        counts = segment_counts(experts, self.num_experts, statistics["segments"], statistics["num_segments"])
        return RouteResult(weights, experts, counts, every.mean_prob, logsumexp)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={(self.num_groups, self.top_groups)}, score={self.score!r}"
