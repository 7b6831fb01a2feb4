"""How much of a batch goes where: counts told and read in exact mode, room of one size for everybody in bounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops import checks
from moe_ops.exchange.agreement import agree, exchange_counts
from moe_ops.exchange.sending import outgoing, padded, trimmed
from moe_ops.exchange.wire import Splits, Wire
from moe_ops.types import Plan

MODES = {"exact": 0, "bounded": 1}


class Leg(NamedTuple):
    """One exchange of tokens.

    Attributes:
        experts: [T, K] int32, -1 where the id was out of range.
        plan: of the T tokens over ranks; its rows are what is sent.
        splits: how many of them go to each rank, and how many come.
        slots: how many slots of the tokens that come are for experts of this rank; None: not known to the host.
        dropped: [] int64, rows that did not fit.
    """

    experts: Tensor
    plan: Plan
    splits: Splits
    slots: int | None
    dropped: Tensor


def check(op: str, mode: Any, rows_per_peer: Any, name: Any, grouped: bool = True) -> None:
    """What a caller can get wrong about an exchange, but for the group; without one there is nothing to say."""
    checks.option(op, "mode", mode, MODES)
    if rows_per_peer is not None:
        if mode == "exact":
            raise ValueError(f"{op}: rows_per_peer must be None where mode is 'exact', got {rows_per_peer}")
        checks.integer(op, "rows_per_peer", rows_per_peer, 0, checks.MAX_INT32)
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{op}: name must be a str or None, got {checks.kind(name)}")
    for option, value, default in (("mode", mode, "exact"), ("name", name, None)):
        if not grouped and value != default:
            raise ValueError(f"{op}: {option} must be {default!r} where group is None, got {value!r}")


def legs(
    chunks: Sequence[Tensor],
    num_experts: int,
    wire: Wire,
    mode: str,
    rows_per_peer: int | None,
    sizes: dict[str, int],
    options: dict[str, Any],
) -> list[Leg]:
    """Plans the exchange of each chunk, experts [T, K].

    Args:
        mode: "exact": the ranks tell each other all chunks' counts and compare sizes and options, and the host waits
            for that once. "bounded": neither, but that they compare where `agree` can.
        rows_per_peer: of all chunks together, in bounded mode.
    """
    sizes = {"num_experts": num_experts, "top_k": chunks[0].shape[1], "chunks": len(chunks), **sizes}
    options = {"mode": mode, **options}
    if mode == "bounded":  # the first chunk is the largest
        room = chunks[0].shape[0] if rows_per_peer is None else -(-rows_per_peer // len(chunks))
        agree({**sizes, "rows_per_peer": room}, options, wire, chunks[0].device)
        return [_bounded(experts, num_experts, wire, room) for experts in chunks]
    outs = [outgoing(experts, num_experts, wire.world) for experts in chunks]
    sent, came = exchange_counts(torch.cat([out.counts for out in outs], 1), sizes, options, wire)
    nothing = outs[0].plan.offsets.new_zeros((), dtype=torch.int64)
    return [
        Leg(
            out.experts,
            trimmed(out.plan, sum(sent[2 * i])),
            Splits(sent[2 * i], came[2 * i]),
            sum(came[2 * i + 1]),
            nothing,
        )
        for i, out in enumerate(outs)
    ]


def _bounded(experts: Tensor, num_experts: int, wire: Wire, room: int) -> Leg:
    out = outgoing(experts, num_experts, wire.world, capacity=room)
    even = [room] * wire.world
    return Leg(out.experts, padded(out.plan, room), Splits(even, even), None, out.wanted - out.plan.counts.sum())


def options_of(**tensors: Tensor | None) -> dict[str, Any]:
    """What every rank must agree on, or the exchange would bring garbage or hang, now or in backward."""
    dtypes = {
        f"dtype of {name}": None if value is None else checks.name_of(value.dtype) for name, value in tensors.items()
    }
    return dtypes | {f"gradient of {name}": needs_gradient(value) for name, value in tensors.items()}


def needs_gradient(value: Tensor | None) -> bool:
    return value is not None and torch.is_grad_enabled() and value.requires_grad
