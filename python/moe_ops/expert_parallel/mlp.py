"""moe_mlp over a process group: tokens travel to their experts' ranks, and sums of what these make of them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_ops import autocast, checks, functional, ops
from moe_ops.exchange.agreement import MAX_CHUNKS
from moe_ops.exchange.cargo import receive, send
from moe_ops.exchange.legs import check, legs, needs_gradient, options_of
from moe_ops.exchange.sending import owned
from moe_ops.exchange.verbs import as_sent
from moe_ops.exchange.wire import finish, start, wire_of
from moe_ops.packing import operand
from moe_ops.types import PackedWeight

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
    name: str | None = None,
    activation: str = "silu",
    gated: bool = True,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    layout: str = "concatenated",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    weight_on: str = "output",
    capacity: int | None = None,
    drop_policy: str = "position",
) -> Any:
    """`moe_ops.moe_mlp` with the experts spread over W ranks: y of this rank's tokens. Every rank must call.

    Rank r owns the experts r * ceil(E / W) .. (r + 1) * ceil(E / W), the last ranks fewer or none. A token travels once
    to each rank that has experts of it; there the grouped GEMM reads it in place, its outputs are summed with their
    weights in float32 (float64 for float64) and rounded, and one row comes back; the sum of those is rounded again.

    Ranks may have any numbers of tokens; those that have none call, too. Backward exchanges by the counts of forward.
    For a fixed W two runs are bitwise equal.

    Args:
        x: [T, H], any float dtype, as it travels; under autocast that of autocast.
        weights: [T, K], any float dtype.
        experts: [T, K] int32 or int64, of all E experts; ids outside 0..E-1 are dropped slots.
        w_in, w_out, b_in, b_out: of this rank's own experts, as moe_ops.moe_mlp takes them, E_local = 0 included.
        group: a ProcessGroup, or a DeviceMesh of one dimension.
        num_experts: E, over all ranks.
        mode: "exact": counts are exchanged and read first, the only host synchronisation, and everything that must be
            the same on all ranks is compared. "bounded": room for rows_per_peer tokens from each rank to each, static
            shapes, no synchronisation; compared on a CPU only, outside torch.compile.
        rows_per_peer: of bounded mode, over all chunks; the same on every rank. None: as many as x has, which is always
            enough and asks for the same T on every rank. Tokens that do not fit lose their experts of that rank.
        chunks: 1 to 32: the tokens travel and are computed in so many parts, the exchange of one behind the GEMMs of
            another.
        shared: called while the first tokens travel; what it returns, [T, H] of the dtype x travels in, is added.
        name: of the layer, in errors of the exchange.
        activation, gated, layout, alpha, limit, up_offset, weight_on: as in moe_ops.moe_mlp.
        capacity, drop_policy: as moe_ops.plan takes them, of the tokens of all ranks, in the order of ranks: what one
            rank with all of them would drop. Needs chunks = 1.

    Returns:
        [T, H], the dtype of x; where rows_per_peer is given a pair of it and dropped [] int64, how many rows of this
        rank's tokens did not fit.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value; where ranks disagree, on
            every rank, if they compare: see mode.
        RuntimeError: the exchange failed: a rank died, or did not answer within the timeout of the group.
    """
    check(OP, mode, rows_per_peer, name)
    wire = wire_of(OP, group, name)
    checks.no_tangents(OP, x, weights, w_in, w_out, b_in, b_out)
    checks.integer(OP, "num_experts", num_experts, 1, checks.MAX_INT32 - 1)
    checks.integer(OP, "chunks", chunks, 1, MAX_CHUNKS)
    if capacity is not None:
        checks.integer(OP, "capacity", capacity, 0, checks.MAX_INT64)
        if chunks != 1:
            raise ValueError(f"{OP}: chunks must be 1 where a capacity is given, got {chunks}")
    x, w_in, w_out, b_in, b_out = autocast.operands(x, w_in, w_out, b_in, b_out)
    mine = owned(num_experts, wire.rank, wire.world)
    own, inner = _check(x, weights, experts, w_in, w_out, gated, b_in, b_out, num_experts, mine)
    functional.mlp_options(OP, x.dtype, activation, layout, alpha, limit, up_offset, weight_on, drop_policy)
    if shared is not None and not callable(shared):
        raise TypeError(f"{OP}: shared must be None or callable, got {checks.kind(shared)}")
    kind: dict[str, Any] = {"activation": activation, "gated": gated, "layout": layout, "weight_on": weight_on}
    options = {**kind, "alpha": alpha, "limit": limit, "up_offset": up_offset}
    weights = as_sent(weights, x)
    sizes = {"hidden": x.shape[1], "inner": inner}
    same = {**options_of(x=x, weights=weights), **kind, **own, "capacity": capacity, "drop_policy": drop_policy}
    tokens, routes = x.tensor_split(chunks), weights.tensor_split(chunks)
    plans = legs(experts.tensor_split(chunks), num_experts, wire, mode, rows_per_peer, sizes, same)

    cargo = [send(tokens[0], routes[0], plans[0], wire)]
    beside = None if shared is None else _beside(shared(), x)
    back = []
    for i, leg in enumerate(plans):
        if i + 1 < chunks:
            cargo.append(send(tokens[i + 1], routes[i + 1], plans[i + 1], wire))
        rows, row_weights, plan = receive(cargo.pop(0), leg, num_experts, wire, capacity, drop_policy)
        sums = functional.moe_mlp(rows, row_weights, None, w_in, w_out, b_in=b_in, b_out=b_out, plan=plan, **options)
        back.append(start(sums, wire, leg.splits.swapped()))
    y = torch.cat(
        [
            ops.combine(finish(sums, wire, leg.splits.swapped()), None, leg.plan)
            for sums, leg in zip(back, plans, strict=True)
        ]
    )
    if beside is not None:
        y = y + beside
    return y if rows_per_peer is None else (y, torch.stack([leg.dropped for leg in plans]).sum())


def _beside(y: Any, x: Tensor) -> Tensor:
    """What shared returned, if it can be added."""
    name = "what shared returns"
    checks.floats(OP, name, y, "[tokens, hidden]", 2)
    checks.shape(OP, name, y, "[tokens, hidden]", tuple(x.shape))
    if y.dtype != x.dtype:
        raise TypeError(
            f"{OP}: {name} must have the dtype of x ({checks.name_of(x.dtype)}), got {checks.name_of(y.dtype)}"
        )
    result: Tensor = y
    return result


def _check(
    x: Any, weights: Any, experts: Any, w_in: Any, w_out: Any, gated: bool, b_in: Any, b_out: Any,
    num_experts: int, own: tuple[int, int],
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """Checks before the exchange what would raise behind it, where other ranks wait; returns what they must share."""
    checks.flag(OP, "gated", gated)
    (w_in, _), (w_out, _) = operand(w_in), operand(w_out)
    checks.moe_mlp(x, weights, w_in, w_out, gated, b_in, b_out)
    checks.ids(OP, "experts", experts, "[tokens, top_k]", 2)
    checks.shape(OP, "experts", experts, "[tokens, top_k]", tuple(weights.shape))
    checks.same_device(OP, "experts", experts, "x", x)
    first, last = own
    if w_in.shape[0] != last - first:
        raise ValueError(
            f"{OP}: w_in must hold this rank's experts {first}..{last - 1} of {num_experts}, {last - first} in all, "
            f"got {list(w_in.shape)}"
        )
    names = {"w_in": w_in, "w_out": w_out, "b_in": b_in, "b_out": b_out}
    needed = [name for name, value in names.items() if needs_gradient(value)]
    return {"biases": (b_in is not None, b_out is not None), "gradients of": needed}, w_out.shape[2]
