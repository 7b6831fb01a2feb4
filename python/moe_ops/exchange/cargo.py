"""What travels: rows of tokens, and beside each its token's experts and weights, as int32 side by side."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops import ops
from moe_ops.exchange.legs import Leg
from moe_ops.exchange.sending import owned, trimmed
from moe_ops.exchange.wire import Flight, Wire, arrive, finish, leave, start
from moe_ops.types import Plan


class Cargo(NamedTuple):
    """Tokens in flight.

    Attributes:
        rows: [S, H] sent, [N, H] received.
        labels: experts, and the bits of the weights.
        weights: [S, K], those sent, for their gradient to come back to.
    """

    rows: Flight
    labels: Flight
    weights: Tensor | None


def send(x: Tensor, weights: Tensor | None, leg: Leg, wire: Wire) -> Cargo:
    """Starts the exchange of tokens x [T, H] with weights [T, K], float32 or float64."""
    labels, left = ops.permute(leg.experts + 1, leg.plan) - 1, None  # fillers, which are zeros, become -1
    if weights is not None:
        left = ops.permute(weights, leg.plan)
        labels = torch.cat([labels, left.detach().view(torch.int32)], 1)
        left = leave(left, wire)
    in_flight = start(labels, wire, leg.splits)
    return Cargo(start(ops.permute(x, leg.plan), wire, leg.splits), in_flight, left)


def receive(
    cargo: Cargo, leg: Leg, num_experts: int, wire: Wire, capacity: int | None = None, drop_policy: str = "position"
) -> tuple[Tensor, Any, Plan]:
    """(tokens [N, H], weights [N, K] or None, plan of the N tokens over this rank's experts), as they have arrived.

    Slots of other ranks' experts are out of range there, and so dropped. Tokens come in the order of ranks, and their
    slots keep their k, so that capacity drops what one rank with all tokens would.
    """
    labels = finish(cargo.labels, wire, leg.splits)
    top_k = leg.experts.shape[1]
    experts, weights, raw = labels[:, :top_k], None, None
    if cargo.weights is not None:
        # A copy even where the slice is contiguous: float64 must not begin in the middle.
        raw = labels[:, top_k:].clone(memory_format=torch.contiguous_format).view(cargo.weights.dtype)
        weights = arrive(cargo.weights, raw, wire, leg.splits)
    tokens = finish(cargo.rows, wire, leg.splits)
    first, last = owned(num_experts, wire.rank, wire.world)
    plan = ops.plan(experts - first, max(last - first, 1), capacity=capacity, drop_policy=drop_policy, weights=raw)
    if last == first:
        plan = plan._replace(offsets=plan.offsets[:1], counts=plan.counts[:0])
    return tokens, weights, plan if leg.slots is None else trimmed(plan, leg.slots)
