"""The one collective that rows travel by, all_to_all_single, in two halves: start and finish.

What is started is in flight until it is finished, and nothing may read it. The halves are each other's gradient, with
the splits swapped: backward finds the exchange started as early as forward did, and needs no counts of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_ops import checks
from moe_ops.exchange.failure import failed


class Wire(NamedTuple):
    """A process group and whom errors speak of.

    Attributes:
        group: the group's name.
        rank, world: this process's place in it, and its size.
        label: operation and layer.
    """

    group: str
    rank: int
    world: int
    label: str


class Splits(NamedTuple):
    """How many rows of a buffer go to each rank, and how many come from each."""

    send: list[int]
    receive: list[int]

    def swapped(self) -> Splits:
        return Splits(self.receive, self.send)


def wire_of(op: str, group: Any, name: str | None) -> Wire:
    """The process group of an argument, which may be a DeviceMesh of one dimension."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{op}: group must be a DeviceMesh of one dimension, got one of {group.ndim}")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: group must hold this rank, got one of other ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a ProcessGroup or a DeviceMesh, got {checks.kind(group)}")
    label = op if name is None else f"{op} ({name})"
    return Wire(group.group_name, dist.get_rank(group), dist.get_world_size(group), label)


def resolve_group(name: str) -> Any:
    """The process group of a Wire."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


class Flight(NamedTuple):
    """Rows on their way.

    Attributes:
        left: the rows that were sent, for their gradient to come back to.
        received: [N, ...], where the rows of the other ranks will lie.
    """

    left: Tensor
    received: Tensor


def start(x: Tensor, wire: Wire, splits: Splits) -> Flight:
    """Sends off x's rows [S, ...]."""
    return Flight(_Leave.apply(x, wire), _send(x.detach(), wire, splits))


def finish(flight: Flight, wire: Wire, splits: Splits) -> Tensor:
    """The rows that arrived. Waits for them, and in backward sends their gradient off."""
    return arrive(flight.left, _wait(flight.received, wire), wire, splits)


def arrive(left: Tensor, received: Tensor, wire: Wire, splits: Splits) -> Tensor:
    """received, which has arrived, as what has become of `left`."""
    out: Tensor = _Arrive.apply(left, received, wire, splits)
    return out


def leave(x: Tensor, wire: Wire) -> Tensor:
    """x, as what is sent by other means and becomes the `left` of arrive."""
    left: Tensor = _Leave.apply(x, wire)
    return left


def _send(x: Tensor, wire: Wire, splits: Splits) -> Tensor:
    all_to_all = torch.ops._c10d_functional.all_to_all_single
    return _named(wire, all_to_all, x.contiguous(), splits.receive, splits.send, wire.group)


def _wait(received: Tensor, wire: Wire) -> Tensor:
    return _named(wire, torch.ops._c10d_functional.wait_tensor, received)


def _named(wire: Wire, collective: Any, *args: Any) -> Any:
    """collective(*args), whose failure says which layer's it was. A graph is traced without that."""
    if torch.compiler.is_compiling():
        return collective(*args)
    try:
        return collective(*args)
    except RuntimeError as error:
        raise failed(wire, error) from error


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _wait(grad, ctx.wire), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, received: Tensor, wire: Wire, splits: Splits) -> Tensor:
        ctx.wire, ctx.splits = wire, splits
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        sent = _send(grad, ctx.wire, ctx.splits.swapped())
        # Anomaly mode looks for NaN in what this returns.
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
            sent = _wait(sent, ctx.wire)
        return sent, None, None, None
