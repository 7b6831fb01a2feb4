"""ZeroComputationExperts: experts that drop a token, pass it on, or replace it, beside those that compute."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.nn.router_base import linear


class ZeroComputationExperts(torch.nn.Module):
    """Experts without a feed-forward layer (Jin et al. 2024, "MoE++", arXiv:2410.07348, equations 3 to 5).

    Zero experts give 0; skip experts give the token x itself (the copy experts of the paper, LongCat-Flash's identity
    experts); a constant expert gives a0 · x + a1 · v with a learned v and [a0, a1] = softmax(W x). `MoE` puts them
    behind its own experts: ids from num_experts on are zero, then skip, then constant ones; the router scores all.
    They take any number of tokens: a capacity_factor is that of the experts that compute. The paper's gating residuals
    and the capacity it derives from the share of each kind are not here.

    Args:
        hidden: of the tokens.
        zero, skip, constant: how many of each.

    `vectors` [constant, hidden] and `mix` [constant, 2, hidden] start uniform within 1/sqrt(hidden).
    """

    def __init__(
        self,
        hidden: int,
        *,
        zero: int = 0,
        skip: int = 0,
        constant: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "ZeroComputationExperts"
        module_checks.sizes(op, hidden=hidden)
        for name, value in (("zero", zero), ("skip", skip), ("constant", constant)):
            checks.integer(op, name, value, 0, checks.MAX_INT32 - 1)
        module_checks.parameters(op, dtype)
        self.hidden, self.zero, self.skip, self.constant = hidden, zero, skip, constant
        self.num_experts = zero + skip + constant
        if self.num_experts == 0:
            raise ValueError(f"{op}: zero, skip or constant must be at least 1, got 0 of each")
        self.vectors = self.mix = None
        if constant:
            self.vectors = torch.nn.Parameter(torch.empty(constant, hidden, device=device, dtype=dtype))
            self.mix = torch.nn.Parameter(torch.empty(constant, 2, hidden, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        bound = self.hidden**-0.5
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, first: int) -> Tensor:
        """What these experts add to the output, [tokens, hidden] in x's dtype.

        Args:
            x: tokens [tokens, hidden].
            weights, experts: [tokens, k], as a router returns them.
            first: the id of the first of these experts; lower ids are other experts'.
        """
        op = "ZeroComputationExperts"
        module_checks.tokens(op, x, self.hidden)
        checks.tensor(op, "x", x, "[tokens, hidden]", 2)
        checks.floats(op, "weights", weights, "[tokens, k]", 2)
        checks.ids(op, "experts", experts, "[tokens, k]", 2)
        checks.integer(op, "first", first, 0)
        first += self.zero
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide, weights = x.to(dtype), weights.to(dtype)
        skipped = (experts >= first) & (experts < first + self.skip)
        of_x = torch.where(skipped, weights, 0).sum(1, keepdim=True)  # [tokens, 1], the factor of x
        if self.vectors is None or self.mix is None:
            return (of_x * wide).to(x.dtype)
        ids = torch.arange(self.constant, device=x.device) + first + self.skip
        of_constant = torch.where(experts.unsqueeze(2) == ids, weights.unsqueeze(2), 0).sum(1)  # [tokens, constant]
        mix = linear(x, self.mix.flatten(0, 1)).unflatten(1, (self.constant, 2)).softmax(2)  # [tokens, constant, 2]
        of_x = of_x + (of_constant * mix[:, :, 0]).sum(1, keepdim=True)
        of_vectors = of_constant * mix[:, :, 1]
        return (of_x * wide + linear(of_vectors, self.vectors.t())).to(x.dtype)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, zero={self.zero}, skip={self.skip}, constant={self.constant}"
