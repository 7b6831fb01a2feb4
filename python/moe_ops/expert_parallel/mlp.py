"""moe_mlp over a process group: tokens travel to their experts' ranks, and sums of what these make of them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops import autocast, checks, functional, ops
from moe_ops.exchange import verbs as across
from moe_ops.exchange.agreement import MAX_CHUNKS, exchange_counts
from moe_ops.exchange.sending import Cargo, local_plan, outgoing, owned, receive, send, trimmed
from moe_ops.exchange.wire import Splits, Wire, finish, start, wire_of
from moe_ops.types import PackedWeight, Plan

OP = "expert_parallel.moe_mlp"


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor | PackedWeight,
    w_out: Tensor | PackedWeight,
    *,
    group: Any,
    num_experts: int,
    mode: str = "exact",
    rows_per_peer: int | None = None,
    chunks: int = 1,
    shared: Callable[[], Tensor] | None = None,
    capacity: int | None = None,
    drop_policy: str = "position",
    name: str | None = None,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    **options: Any,
) -> Any:
    """`moe_ops.moe_mlp` with the experts spread over ranks."""
    wire = wire_of(OP, group, name)
    checks.integer(OP, "chunks", chunks, 1, MAX_CHUNKS)
    x, w_in, w_out, b_in, b_out = autocast.operands(x, w_in, w_out, b_in, b_out)
    bounded = across.bounded_rows(OP, mode, rows_per_peer, -(-x.shape[0] // chunks))
    travelling = across.in_compute_dtype(weights, x)
    parts = list(
        zip(
            x.tensor_split(chunks),
            experts.tensor_split(chunks),
            travelling.tensor_split(chunks),
            strict=True,
        )
    )
    cargo = []
    if bounded is None:
        outs = [outgoing(ids, num_experts, wire.world) for _, ids, _ in parts]
        config = {
            **across.config_of(x, experts, num_experts, weights),
            "chunks": chunks,
            "capacity": capacity,
            "drop_policy": drop_policy,
            "options": options,
        }
        sent, received = exchange_counts(torch.cat([out.counts for out in outs], 1), config, wire)
        for i, out in enumerate(outs):
            splits = Splits(sent[2 * i], received[2 * i])
            cargo.append((out, trimmed(out.plan, sum(splits.send)), splits, sum(received[2 * i + 1])))
        dropped = None
    else:
        dropped = 0
        for _, ids, _ in parts:
            out, plan, splits, lost = across.bounded_plan(ids, num_experts, wire, bounded)
            cargo.append((out, plan, splits, None))
            dropped = dropped + lost

    def depart(i: int) -> Cargo:
        tokens, _, token_weights = parts[i]
        out, plan, splits, _ = cargo[i]
        return send(tokens, out.experts, token_weights, plan, wire, splits)

    flights = {0: depart(0)}
    beside = None if shared is None else shared()
    returning = []
    for i in range(chunks):
        if i + 1 < chunks:
            flights[i + 1] = depart(i + 1)
        _, plan, splits, slots = cargo[i]
        tokens, ids, token_weights = receive(flights.pop(i), experts.shape[1], wire, splits)
        local = local_plan(ids, num_experts, wire, capacity, drop_policy, token_weights)
        if slots is not None:
            local = trimmed(local, slots)
        sums = functional.moe_mlp(
            tokens, token_weights, None, w_in, w_out, plan=local, b_in=b_in, b_out=b_out, **options
        )
        returning.append(start(sums, wire, splits.swapped()))
    ys = []
    for (_, plan, splits, _), sums in zip(cargo, returning, strict=True):
        ys.append(ops.combine(finish(sums, wire, splits.swapped()), None, plan))
    y = ys[0] if chunks == 1 else torch.cat(ys)
    if beside is not None:
        y = y + beside
    return y if rows_per_peer is None else (y, dropped)
