"""dispatch and combine over a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, ops
from moe_ops.exchange.agreement import agree
from moe_ops.exchange.cargo import receive, send
from moe_ops.exchange.legs import legs, options_of
from moe_ops.exchange.wire import Splits, Wire, finish, start, wire_of
from moe_ops.types import ExpertParallelPlan


def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    capacity: int | None,
    drop_policy: str,
    weights: Tensor | None,
    group: Any,
    mode: str,
    rows_per_peer: int | None,
    name: str | None,
) -> tuple[Tensor, ExpertParallelPlan]:
    """`moe_ops.dispatch` over a group, its arguments but for the group checked."""
    wire = wire_of("dispatch", group, name)
    weights = None if weights is None else as_sent(weights, x)
    options = {**options_of(x=x, weights=weights), "capacity": capacity, "drop_policy": drop_policy}
    (leg,) = legs([experts], num_experts, wire, mode, rows_per_peer, {"hidden": x.shape[1]}, options)
    cargo = send(x, weights, leg, wire)
    tokens, weights, received = receive(cargo, leg, num_experts, wire, capacity, drop_policy)
    offsets, _, _, counts = received
    plan = ExpertParallelPlan(
        offsets, counts, received, leg.plan, weights, leg.dropped, leg.splits.send, leg.splits.receive,
        wire.group, wire.rank, wire.world, name,
    )  # fmt: skip
    return ops.permute(tokens, received), plan


def combine(rows: Tensor, weights: Tensor | None, plan: ExpertParallelPlan) -> Tensor:
    """`moe_ops.combine` over a group: sums are formed where the experts are, and travel back."""
    label = "combine" if plan.name is None else f"combine ({plan.name})"
    wire = Wire(plan.group, plan.rank, plan.world, label)
    splits = Splits(plan.send, plan.receive)
    checks.combine(rows, None, plan.received.row_slot, plan.received.slot_row)
    if weights is None:
        weights = plan.weights
    elif plan.weights is not None:
        raise ValueError("combine: weights must be None, as dispatch was given weights, got a Tensor")
    else:  # fewer bytes than the rows of slots that travelled once would be
        checks.floats("combine", "weights", weights, "[tokens, top_k]", 2)
        checks.shape("combine", "weights", weights, "[tokens, top_k]", tuple(plan.sent.slot_row.shape))
        checks.same_device("combine", "weights", weights, "rows", rows)
        weights = as_sent(weights, rows)
    agree({"hidden": rows.shape[1]}, options_of(rows=rows, weights=weights), wire, rows.device)
    if weights is not None and plan.weights is None:  # they have not travelled yet
        weights = ops.permute(weights, plan.sent)
        weights = finish(start(weights, wire, splits), wire, splits)
    sums = ops.combine(rows, weights, plan.received)
    back = splits.swapped()
    return ops.combine(finish(start(sums, wire, back), wire, back), None, plan.sent)


def as_sent(weights: Tensor, x: Tensor) -> Tensor:
    """Weights as they travel: what sums are formed in."""
    return weights.to(torch.float64 if torch.float64 in (weights.dtype, x.dtype) else torch.float32)
