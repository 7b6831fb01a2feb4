"""ExpertChoiceRouter: experts choose their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import ops
from moe_ops.nn.router_base import LinearRouter, segment_counts
from moe_ops.types import Plan, RouteResult


class ExpertChoiceRouter(LinearRouter):
    """Every expert takes the tokens that score highest with it: an even load by construction, without losses or drops
    (Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", arXiv:2202.09368).

    With S = softmax(logits) over the experts, an expert takes the ceil(tokens · top_k / num_experts) largest of its
    column, ties to the earlier token, and weighs them by S. A token gets top_k experts on the mean, and any number from
    none to all.

    NOT CAUSAL: whether a token is taken depends on all tokens of the call, later ones of the same sequence and other
    sequences among them. A language model trained so has seen the future through its routing, and does not decode as it
    was trained; use it in encoders, vision or diffusion. `causal` is False.

    Args:
        hidden, num_experts, top_k, bias, jitter: as in `LinearRouter`; top_k is the paper's capacity factor c.

    Returns (forward):
        weights [tokens, num_experts], zero where an expert did not take the token, and experts [tokens, num_experts]
        int32, the expert's id or -1. `plan(experts)` gives the num_experts · capacity rows; MoE uses it.
    """

    token_choice = False
    causal = False
    scores_by = "logits"

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
        self.reset_parameters()

    def capacity(self, tokens: int) -> int:
        """Tokens that each expert takes out of so many."""
        return (tokens * self.top_k + self.num_experts - 1) // self.num_experts

    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        logits = self.logits(x)
        score = logits.softmax(1)  # [tokens, experts]
        order = score.detach().t().sort(dim=1, descending=True, stable=True).indices  # [experts, tokens]
        taken = torch.zeros_like(score, dtype=torch.bool)
        taken = taken.scatter(0, order[:, : self.capacity(x.shape[0])].t(), True)
        ids = torch.arange(self.num_experts, dtype=torch.int32, device=x.device)
        experts = torch.where(taken, ids, -1)
        weights = torch.where(taken, score, 0)
        if not statistics["stats"]:
            return weights, experts
        all_experts = ops.route(logits, self.num_experts, **statistics)
        counts = segment_counts(experts, self.num_experts, statistics["segments"], statistics["num_segments"])
        return RouteResult(weights, experts, counts, all_experts.mean_prob, all_experts.logsumexp)

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """As in RouterBase, from logits [tokens, num_experts]; zero where an expert did not take the token."""
        return torch.where(experts >= 0, scores.softmax(1), 0)

    def plan(self, experts: Tensor) -> Plan:
        """The rows of the tokens that were taken, by expert, then by token: num_experts · capacity of them."""
        offsets, row_slot, slot_row, counts = ops.plan(experts, self.num_experts)
        return Plan(offsets, row_slot[: self.num_experts * self.capacity(experts.shape[0])], slot_row, counts)
