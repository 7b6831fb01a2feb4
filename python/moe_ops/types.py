"""What the operators return: named tuples of tensors, which torch treats as pytrees.

A *slot* is one (token, k) pair, numbered token * K + k; a *row* is a slot's place in expert order.
"""

from typing import NamedTuple

import torch


class Plan(NamedTuple):
    """Where each slot's row stands: a stable sort of the slots by expert. All tensors are int32.

    Rows of one expert keep slot order. Dropped slots (capacity, ids outside 0..E-1) sort behind offsets[E], in slot
    order. For token choice R = T * K and width = K; other routings may have any R: row_slot then numbers slots of
    slot_row's own width.

    Attributes:
        offsets: [E + 1], exclusive prefix: the rows of expert e are offsets[e] .. offsets[e + 1].
        row_slot: [R], the slot of each row.
        slot_row: [T, width], the row of each slot, -1 where it was dropped.
        counts: [E], rows per expert after drops.
    """

    offsets: torch.Tensor
    row_slot: torch.Tensor
    slot_row: torch.Tensor
    counts: torch.Tensor

    @property
    def row_token(self) -> torch.Tensor:
        """[R], the token of each row."""
        return self.row_slot // max(self.slot_row.shape[1], 1)


class RouteResult(NamedTuple):
    """What route returns with stats=True. Real tensors are float32, or float64 for float64 logits.

    Attributes:
        weights: [T, K], the weight of each choice.
        experts: [T, K] int32, the chosen experts, best first, distinct within a row.
        counts: [S, E] int32, how many slots of a segment chose an expert, before any drop.
        mean_prob: [S, E], the mean over a segment's tokens of the router's probabilities; 0 for an empty segment.
        logsumexp: [T], logsumexp of the (soft-capped) logits.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    counts: torch.Tensor
    mean_prob: torch.Tensor
    logsumexp: torch.Tensor
