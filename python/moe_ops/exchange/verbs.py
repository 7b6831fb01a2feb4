"""dispatch and combine over a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, ops
from moe_ops.exchange.agreement import exchange_counts
from moe_ops.exchange.sending import local_plan, outgoing, padded, receive, send, trimmed
from moe_ops.exchange.wire import Splits, Wire, finish, start, wire_of
from moe_ops.types import ExpertParallelPlan, Plan

MODES = {"exact": 0, "bounded": 1}


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
    """`moe_ops.dispatch` over a group, its arguments but for the last four checked."""
    wire = wire_of("dispatch", group, name)
    bounded = bounded_rows("dispatch", mode, rows_per_peer, x.shape[0])
    weights = None if weights is None else in_compute_dtype(weights, x)
    slots = None
    if bounded is None:
        out = outgoing(experts, num_experts, wire.world)
        config = {**config_of(x, experts, num_experts, weights), "capacity": capacity, "drop_policy": drop_policy}
        (rows_out, _), (rows_in, slots_in) = exchange_counts(out.counts, config, wire)
        splits, slots = Splits(rows_out, rows_in), sum(slots_in)
        sent, dropped = trimmed(out.plan, sum(rows_out)), out.plan.counts.new_zeros((), dtype=torch.int64)
    else:
        out, sent, splits, dropped = bounded_plan(experts, num_experts, wire, bounded)
    flight = send(x, out.experts, weights, sent, wire, splits)
    tokens, ids, token_weights = receive(flight, experts.shape[1], wire, splits)
    received = local_plan(ids, num_experts, wire, capacity, drop_policy, token_weights)
    if slots is not None:
        received = trimmed(received, slots)
    rows = ops.permute(tokens, received)
    offsets, _, _, counts = received
    plan = ExpertParallelPlan(offsets, counts, received, sent, token_weights, dropped, *splits, tuple(wire))
    return rows, plan


def combine(rows: Tensor, weights: Tensor | None, plan: ExpertParallelPlan) -> Tensor:
    """`moe_ops.combine` over a group: sums are formed where the expert is, and travel back."""
    wire, splits = (
        Wire(*plan.wire)._replace(label=plan.wire[3].replace("dispatch", "combine")),
        Splits(plan.send, plan.receive),
    )
    if weights is None:
        weights = plan.weights
    elif plan.weights is not None:
        raise ValueError("combine: weights must be None, as dispatch was given weights, got a Tensor")
    else:
        checks.floats("combine", "weights", weights, "[tokens, top_k]", 2)
        checks.shape("combine", "weights", weights, "[tokens, top_k]", tuple(plan.sent.slot_row.shape))
        weights = ops.permute(in_compute_dtype(weights, rows), plan.sent)
        weights = finish(start(weights, wire, splits), wire, splits)
    sums = ops.combine(rows, weights, plan.received)
    back = splits.swapped()
    return ops.combine(finish(start(sums, wire, back), wire, back), None, plan.sent)


def in_compute_dtype(weights: Tensor, x: Tensor) -> Tensor:
    """Weights as they travel."""
    return weights.to(torch.float64 if torch.float64 in (weights.dtype, x.dtype) else torch.float32)


def bounded_rows(op: str, mode: str, rows_per_peer: Any, tokens: int) -> int | None:
    """Rows for each rank in a bounded exchange; None in an exact one."""
    checks.option(op, "mode", mode, MODES)
    if mode == "exact":
        if rows_per_peer is not None:
            raise ValueError(f"{op}: rows_per_peer must be None where mode is 'exact', got {rows_per_peer}")
        return None
    if rows_per_peer is None:
        return tokens
    checks.integer(op, "rows_per_peer", rows_per_peer, 0, checks.MAX_INT32)
    return rows_per_peer


def bounded_plan(experts: Tensor, num_experts: int, wire: Wire, rows: int) -> tuple[Any, Plan, Splits, Tensor]:
    """(outgoing, its plan with `rows` rows for each rank, the splits, how many rows did not fit)."""
    out = outgoing(experts, num_experts, wire.world, capacity=rows)
    even = [rows] * wire.world
    return out, padded(out.plan, rows), Splits(even, even), out.wanted - out.plan.counts.sum()


def config_of(x: Tensor, experts: Tensor, num_experts: int, weights: Tensor | None) -> dict[str, Any]:
    """What every rank must agree on, or the exchange would bring garbage or hang, now or in backward."""
    grads = torch.is_grad_enabled()
    return {
        "hidden": x.shape[1],
        "dtype": checks.name_of(x.dtype),
        "num_experts": num_experts,
        "top_k": experts.shape[1],
        "weights": None if weights is None else checks.name_of(weights.dtype),
        "gradient of x": grads and x.requires_grad,
        "gradient of weights": grads and weights is not None and weights.requires_grad,
    }
