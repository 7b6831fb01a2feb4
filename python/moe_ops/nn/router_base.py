"""What every router has: sizes, the call that MoE makes, and a linear layer in float32."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import Any, Literal, overload

import torch
from torch import Tensor

from moe_ops import checks, module_checks, ops
from moe_ops.types import Plan, RouteResult


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in float32 (float64 where either is), also under autocast."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    has_autocast = x.device.type != "meta"
    with torch.autocast(x.device.type, enabled=False) if has_autocast else contextlib.nullcontext():
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def segment_counts(experts: Tensor, num_experts: int, segments: Tensor | None = None, num_segments: int = 1) -> Tensor:
    """[num_segments, num_experts] int32: slots per expert, for choices that route did not make itself.

    Args:
        experts: [tokens, k] int32 or int64; ids outside 0..num_experts-1 count nowhere.
        segments: [tokens] integer, the segment of each token; those outside 0..num_segments-1 count nowhere.
    """
    if segments is not None:
        known = (segments >= 0) & (segments < num_segments)
        first = (torch.where(known, segments, 0) * num_experts).to(experts.dtype)  # [tokens]
        valid = known.unsqueeze(1) & (experts >= 0) & (experts < num_experts)
        experts = torch.where(valid, experts + first.unsqueeze(1), -1)
    return ops.plan(experts, num_segments * num_experts).counts.view(num_segments, num_experts)


class RouterBase(torch.nn.Module):
    """Weighs num_experts for every token; what `MoE` asks of a router. Subclasses say how in `_route`.

    Attributes:
        hidden, num_experts, top_k: sizes; top_k is what a token gets, on the mean in expert choice.
        token_choice: whether tokens choose experts; else experts choose tokens, and `plan` says which.
        causal: whether a token's experts depend on no later token. Where not, a language model cannot decode with it.
        scores_by: the name of the method that scores tokens, whose result `weigh` takes; None where there is no weigh.
    """

    token_choice = True
    causal = True
    scores_by: str | None = None
    hidden: int
    num_experts: int
    top_k: int

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        stats: Literal[False] = False,
        segments: Tensor | None = None,
        num_segments: int = 1,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        stats: Literal[True],
        segments: Tensor | None = None,
        num_segments: int = 1,
        token_ids: Tensor | None = None,
    ) -> RouteResult: ...

    def forward(
        self,
        x: Tensor,
        *,
        stats: bool = False,
        segments: Tensor | None = None,
        num_segments: int = 1,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | RouteResult:
        """Routes x [..., hidden], its leading dimensions flattened to tokens.

        Args:
            stats, segments, num_segments: as in `moe_ops.route`.
            token_ids: [...], the vocabulary ids of the tokens: a HashRouter needs them, the others ignore them.

        Returns:
            What `moe_ops.route` returns: (weights, experts), both [tokens, top_k] ([tokens, num_experts] in expert
            choice), or with stats a RouteResult, whose counts, mean_prob and logsumexp are what the losses need.
        """
        op = type(self).__name__
        module_checks.tokens(op, x, self.hidden)
        token_ids = module_checks.token_ids(op, token_ids, x)
        statistics = {"stats": stats, "segments": segments, "num_segments": num_segments}
        return self._route(x.reshape(-1, self.hidden), token_ids, statistics)

    @abstractmethod
    def _route(self, x: Tensor, token_ids: Tensor | None, statistics: dict[str, Any]) -> Any:
        """forward for tokens [tokens, hidden]; statistics are the options stats, segments, num_segments of route."""

    def weigh(self, scores: Any, experts: Tensor) -> Tensor:
        """The weights of experts that were chosen before, for scores of the moment, with gradients.

        Args:
            scores: what the method named by scores_by returns for the tokens.
            experts: [tokens, k] int32, as forward returned them.

        Returns:
            weights [tokens, k]; what they are where an id is none of an expert is not said, but it is finite.
        """
        raise TypeError(f"{type(self).__name__}.weigh: the weights of this router depend on how it chose")

    def set_top_k(self, top_k: int) -> None:
        """Another top_k from now on, where the router has no other size that depends on it."""
        checks.route(torch.empty(0, self.num_experts, device="cpu"), top_k, None, 1, 1, None, None, 1)
        self.top_k = top_k

    def plan(self, experts: Tensor) -> Plan | None:
        """The plan of experts as `forward` returned them, where experts choose tokens; else None."""
        return None


class LinearRouter(RouterBase):
    """A router whose scores are a linear layer of the token.

    The layer runs in float32 (float64 for float64 tokens or weights), also under autocast: a weight held in bfloat16 is
    upcast for the product, so near-ties between experts are not settled by rounding.

    Args:
        hidden, num_experts, top_k: sizes; weight is [num_experts, hidden].
        bias: adds a learned bias [num_experts] to the logits.
        jitter: in training, tokens are multiplied by uniform noise in [1 - jitter, 1 + jitter] before they are scored
            (Fedus et al. 2022, "Switch Transformers"); the experts still see the tokens as they are.

    The weight starts as that of `torch.nn.Linear`, uniform within 1/sqrt(hidden), drawn from torch's generator;
    the bias starts at zero. `moe_ops.nn.init` has other beginnings.
    """

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
        super().__init__()
        op = type(self).__name__
        module_checks.sizes(op, hidden=hidden, num_experts=num_experts)
        checks.route(torch.empty(0, num_experts, device="cpu"), top_k, None, 1, 1, None, None, 1)
        module_checks.flags(op, bias=bias)
        if not 0 <= checks.number(op, "jitter", jitter) < 1:
            raise ValueError(f"{op}: jitter must be in [0, 1), got {jitter}")
        module_checks.parameters(op, dtype)
        self.hidden, self.num_experts, self.top_k, self.jitter = hidden, num_experts, top_k, jitter
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Draws the weight anew; the bias becomes zero."""
        bound = self.hidden**-0.5
        torch.nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def seen(self, x: Tensor) -> Tensor:
        """The tokens as the linear layer sees them: [..., hidden] -> [tokens, hidden], with jitter in training."""
        module_checks.tokens(op := type(self).__name__, x, self.hidden)
        checks.same_device(op, "x", x, "weight", self.weight)
        x = x.reshape(-1, self.hidden).to(torch.promote_types(x.dtype, torch.float32))
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """The scores before route: x [..., hidden] -> [tokens, num_experts], float32 or float64."""
        return linear(self.seen(x), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, num_experts={self.num_experts}, top_k={self.top_k}"
