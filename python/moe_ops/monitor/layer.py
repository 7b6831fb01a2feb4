"""The running sums of one layer, on the device of its counts, and the figures read from them."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor


class LayerSummary(NamedTuple):
    """How one layer used its experts since the last reset.

    Attributes:
        tokens: routed.
        load: per expert, 1 at an even share.
        max_over_mean: of the load; 1 is even, num_experts is collapse.
        entropy: of the load's shares over log(num_experts): 1 is even, 0 is collapse.
        dead: how many experts were never chosen.
        dropped: the share of slots beyond the capacity; 0 where none is known.
        logsumexp_rms: of logsumexp(logits), the root of its mean square over tokens, which the z-loss keeps small; nan
            if not given.
        logsumexp_max: the greatest |logsumexp(logits)|; nan if not given.
    """

    tokens: int
    load: list[float]
    max_over_mean: float
    entropy: float
    dead: int
    dropped: float
    logsumexp_rms: float
    logsumexp_max: float


class Layer:
    """Sums on the device: adding to them never waits for it."""

    def __init__(self, num_experts: int, num_classes: int, coactivation: bool, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.num_experts, self.tokens, self.has_logits = num_experts, 0, False
        self.by_class = zeros(num_classes, num_experts)
        self.dropped = zeros()
        self.square, self.greatest = zeros(dtype=torch.float64), zeros(dtype=torch.float64)
        self.together = zeros(num_experts, num_experts) if coactivation else None
        self.step_counts = zeros(num_experts)
        self.history: list[Tensor] = []

    def add(
        self, experts: Tensor, counts: Tensor, logsumexp: Tensor | None, capacity: int | None, computing: int
    ) -> None:
        """counts: [classes, E] of experts [T, K]; capacity is that of the first `computing` experts."""
        self.tokens += experts.shape[0]
        self.by_class += counts
        of_batch = counts.sum(0)
        self.step_counts += of_batch
        if capacity is not None:  # whichever slots go, an expert keeps this many of them
            self.dropped += (of_batch[:computing] - capacity).clamp(min=0).sum()
        if logsumexp is not None and logsumexp.numel():
            self.has_logits = True
            values = logsumexp.double()
            self.square += values.square().sum()
            self.greatest = torch.maximum(self.greatest, values.abs().max())
        if self.together is not None:
            ids = experts.long()  # [T, K]
            pairs = ids.unsqueeze(2) * self.num_experts + ids.unsqueeze(1)  # [T, K, K]
            chosen = (ids >= 0) & (ids < self.num_experts)
            both = (chosen.unsqueeze(2) & chosen.unsqueeze(1)).flatten().long()
            # Sums of integers: their order does not show.
            self.together.view(-1).index_add_(0, torch.where(both > 0, pairs.flatten(), 0), both)

    def on_host(self, pairs: bool) -> Layer:
        """A copy on the host, without history, and without the pairs where they are not asked for."""
        sent = copy.copy(self)
        sent.history, sent.together = [], self.together if pairs else None
        for name, value in list(vars(sent).items()):
            if isinstance(value, Tensor):
                setattr(sent, name, value.cpu())
        return sent

    def closed(self) -> Tensor:
        """[steps, E] int64: slots per expert of the steps that were closed."""
        return torch.stack(self.history) if self.history else self.step_counts.new_zeros(0, self.num_experts)

    def step(self) -> None:
        self.history.append(self.step_counts)
        self.step_counts = torch.zeros_like(self.step_counts)

    def summary(self) -> LayerSummary:
        counts = self.by_class.sum(0).double().cpu()
        slots = float(counts.sum())
        share = counts / max(slots, 1.0)
        entropy = -(share * share.clamp(min=1e-300).log()).sum() / math.log(max(self.num_experts, 2))
        load = share * self.num_experts
        return LayerSummary(
            tokens=self.tokens,
            load=load.tolist(),
            max_over_mean=float(load.max()),
            entropy=float(entropy),
            dead=int((counts == 0).sum()),
            dropped=float(self.dropped) / max(slots, 1.0),
            logsumexp_rms=math.sqrt(float(self.square) / self.tokens) if self.has_logits else math.nan,
            logsumexp_max=float(self.greatest) if self.has_logits else math.nan,
        )


def total(ranks: list[Layer]) -> Layer:
    """One layer with the sums of several."""
    whole = copy.copy(ranks[0])
    for other in ranks[1:]:
        if other.by_class.shape != whole.by_class.shape:
            sizes = f"{list(whole.by_class.shape)} and {list(other.by_class.shape)}"
            raise ValueError(f"RouterHealth: group must count the same [classes, experts] on all ranks, got {sizes}")
        whole.tokens += other.tokens
        whole.has_logits |= other.has_logits
        whole.by_class = whole.by_class + other.by_class
        whole.dropped = whole.dropped + other.dropped
        whole.square = whole.square + other.square
        whole.greatest = torch.maximum(whole.greatest, other.greatest)
        if whole.together is not None and other.together is not None:
            whole.together = whole.together + other.together
    return whole
