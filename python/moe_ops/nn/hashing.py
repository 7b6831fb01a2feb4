"""HashRouter: a table from the vocabulary to experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks, ops
from moe_ops.nn.router_base import LinearRouter, segment_counts
from moe_ops.types import RouteResult

SCORES = {"uniform": 0, "softmax": 1, "sigmoid": 2, "sqrtsoftplus": 3}


class HashRouter(LinearRouter):
    """A fixed table has a token's experts by its vocabulary id (Roller et al. 2021, "Hash Layers", arXiv:2106.04426).

    Nothing about the choice is learned. The weights are equal, 1 / top_k (Roller et al.), or the chosen experts' scores
    in a learned linear layer, divided by their sum (DeepSeek-V4's hash layers: score="sqrtsoftplus").

    Args:
        hidden, num_experts, top_k, bias, jitter: as in `LinearRouter`; with score="uniform" there is no linear layer,
            so neither weight nor bias.
        vocabulary: ids are 0..vocabulary-1. Ids beyond are dropped slots.
        score: "uniform", "softmax" over all experts, "sigmoid" or "sqrtsoftplus".
        scale: factor of all weights.

    forward needs token_ids, of x's leading dimensions; `MoE` hands them on. The buffer `table` [vocabulary, top_k]
    int32 is drawn from torch's generator: top_k distinct experts per id, each id's independent of the others'; it is
    part of the state dict. `balanced_table` makes one for known frequencies: `router.table.copy_(...)`.
    """

    table: Tensor
    scores_by = "scores"

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        vocabulary: int,
        *,
        score: str = "uniform",
        scale: float = 1.0,
        bias: bool = False,
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden, num_experts, top_k, bias=bias, jitter=jitter, device=device, dtype=dtype)
        module_checks.sizes("HashRouter", vocabulary=vocabulary)
        checks.option("HashRouter", "score", score, SCORES)
        self.score, self.scale = score, checks.number("HashRouter", "scale", scale)
        if score == "uniform":
            if bias:
                raise ValueError("HashRouter: bias must be False with score 'uniform', got True")
            self.register_parameter("weight", None)
        self.register_buffer("table", torch.empty(vocabulary, top_k, dtype=torch.int32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table and the weight anew."""
        if self.score != "uniform":
            super().reset_parameters()
        draw = torch.rand(self.table.shape[0], self.num_experts, device=self.table.device)
        self.table.copy_(draw.topk(self.top_k, dim=1).indices)

    def logits(self, x: Tensor) -> Tensor:
        """As in LinearRouter; with score "uniform" there are none, and this is a ValueError."""
        if self.score == "uniform":
            raise ValueError("HashRouter: score must be one that scores tokens to have logits, got 'uniform'")
        return super().logits(x)

    def scores(self, x: Tensor) -> Tensor:
        """The logits, or zeros with score "uniform": x [..., hidden] -> [tokens, num_experts]."""
        if self.score != "uniform":
            return self.logits(x)
        x = x.reshape(-1, self.hidden)
        return x.new_zeros(x.shape[0], self.num_experts, dtype=torch.promote_types(x.dtype, torch.float32))

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """As in RouterBase, from scores [tokens, num_experts]."""
        if self.score == "uniform":
            return torch.full_like(scores[:, : self.top_k], self.scale / self.top_k)
        chosen = _scored(scores, self.score).gather(1, experts.clamp(min=0).long())
        return chosen / (chosen.sum(1, keepdim=True) + 1e-20) * self.scale

    def set_top_k(self, top_k: int) -> None:
        """Refused: top_k is the table's."""
        raise ValueError(f"{type(self).__name__}: top_k must stay {self.top_k}, got {top_k}")

    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        if token_ids is None:
            raise ValueError("HashRouter: token_ids must be given, got None")
        known = (token_ids >= 0) & (token_ids < self.table.shape[0])
        experts = self.table[torch.where(known, token_ids, 0).long()]  # [tokens, top_k]
        experts = torch.where(known.unsqueeze(1), experts, -1)
        logits = self.scores(x)
        weights = self.weigh(logits, experts)
        if not statistics["stats"]:
            return weights, experts
        score = "softmax" if self.score == "uniform" else self.score
        would: Any = ops.route(logits, self.top_k, score=score, **statistics)
        counts = segment_counts(experts, self.num_experts, statistics["segments"], statistics["num_segments"])
        return RouteResult(weights, experts, counts, would.mean_prob, would.logsumexp)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, vocabulary={self.table.shape[0]}, score={self.score!r}, scale={self.scale}"


def _scored(logits: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return logits.softmax(1)
    if score == "sigmoid":
        return logits.sigmoid()
    return torch.logaddexp(logits, torch.zeros_like(logits)).sqrt()


def balanced_table(frequencies: Tensor, num_experts: int, top_k: int = 1) -> Tensor:
    """A table that gives every expert about the same share of the text (Roller et al. 2021, "Balanced assignment").

    Ids are taken from the most frequent on, and each goes to the top_k experts that have least so far, ties to the
    lowest expert. Runs on the host, once.

    Args:
        frequencies: [vocabulary], how often each id occurs, any real dtype.

    Returns:
        [vocabulary, top_k] int32, on the device of frequencies.
    """
    op = "balanced_table"
    checks.tensor(op, "frequencies", frequencies, "[vocabulary]", 1)
    module_checks.sizes(op, num_experts=num_experts)
    checks.route(torch.empty(0, num_experts, device="cpu"), top_k, None, 1, 1, None, None, 1)
    counts = frequencies.double().cpu()
    load = torch.zeros(num_experts, dtype=torch.float64)
    table = torch.empty(len(counts), top_k, dtype=torch.int32)
    for token in counts.argsort(descending=True, stable=True).tolist():
        emptiest = load.argsort(stable=True)[:top_k]
        table[token] = emptiest
        load[emptiest] += counts[token]
    return table.to(frequencies.device)
