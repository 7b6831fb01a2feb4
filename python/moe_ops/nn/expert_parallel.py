"""Experts spread over the ranks of a process group: every rank holds its own, tokens travel to them and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_ops import checks, exchange, expert_parallel, ops
from moe_ops.exchange.agreement import MAX_CHUNKS
from moe_ops.expert_parallel import sharding
from moe_ops.expert_parallel.gradients import Scale
from moe_ops.expert_parallel.handshake import handshake
from moe_ops.nn.experts import Experts
from moe_ops.types import Plan

OPTIONS = ("mode", "rows_per_peer", "chunks", "gradients", "name")  # of the exchange, beside mesh
COMPUTE = ("activation", "gated", "layout", "alpha", "limit", "up_offset", "weight_on")  # of Experts
GRADIENTS = {"mean": 0, "sum": 1}

_layers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # how many were built on a process group


class ExpertParallelExperts(Experts):
    """`Experts` of which every rank of a mesh dimension "ep" holds a part, torch.chunk's: rank r of W has the experts
    r · ceil(E/W) to (r + 1) · ceil(E/W), the last ranks fewer or none.

    The weights are DTensors, Shard(0) over the mesh, of the names and shapes of `Experts`: optimizers, FSDP2's
    fully_shard on another dimension of the mesh, and torch.distributed.checkpoint, which loads them on any number of
    ranks, take them as they are. They start as those of `Experts` on one rank would, if torch's generator is in the
    same state on all ranks; no rank ever holds more than one expert that is not its own.

    Building is collective: the ranks compare their options, and where they differ every rank raises a ValueError that
    names the option and who has what.

    Args:
        num_experts, hidden, inner, and further options: as in `Experts`, but impl, which is "moe_ops".
        mesh: a DeviceMesh with a dimension named "ep".
        mode, rows_per_peer, chunks: of the exchange, as in `moe_ops.expert_parallel.moe_mlp`.
        gradients: "mean": the experts' gradients are those of the mean of the ranks' losses, which is what
            DistributedDataParallel and FSDP2 make of all others; "sum": those of the sum.
        name: of the layer, in errors; by default the number of the layer among those built on this group.

    Attributes:
        dropped: [] int64 on the device: with rows_per_peer, how many rows of this rank did not fit so far; those of
            a forward that activation checkpointing runs twice count twice.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        inner: int,
        *,
        mesh: Any,
        mode: str = "exact",
        rows_per_peer: int | None = None,
        chunks: int = 1,
        gradients: str = "mean",
        name: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        op = "ExpertParallelExperts"
        self.mesh = sharding.ep_mesh(op, mesh)
        exchange.check(op, mode, rows_per_peer, name)
        checks.integer(op, "chunks", chunks, 1, MAX_CHUNKS)
        checks.option(op, "gradients", gradients, GRADIENTS)
        if options.get("impl", "moe_ops") != "moe_ops":
            raise ValueError(f"{op}: impl must be 'moe_ops', got {options['impl']!r}")
        self.mode, self.rows_per_peer, self.chunks, self.gradients = mode, rows_per_peer, chunks, gradients
        group = self.mesh.get_group()
        _layers[group] = number = _layers.get(group, 0) + 1
        self.name = f"layer {number}" if name is None else name
        state = _generator_state(self.mesh.device_type)
        super().__init__(num_experts, hidden, inner, device=device, dtype=dtype, **options)
        # No buffer: data parallelism would make it that of rank 0.
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.mesh.device_type)
        names = ("num_experts", "hidden", "inner", *COMPUTE, *OPTIONS[:-1])
        fields = {"layer": (number, name)} | {name: getattr(self, name) for name in names}
        fields |= {"bias": self.b_in is not None, "dtype": self.w_in.dtype, "torch": torch.__version__}
        if not self.w_in.is_meta:
            fields["torch's generator (its state, from torch.manual_seed)"] = state
        self.agree(**fields)

    def agree(self, **fields: Any) -> None:
        """Raises a ValueError on every rank of the group, naming field and ranks, if a field is not the same on all."""
        op = f"ExpertParallelMoE ({self.name})"
        handshake(op, self.mesh.get_group(), torch.device(self.mesh.device_type), fields)

    def _empty(self, shape: tuple[int, ...], device: Any, dtype: torch.dtype | None) -> Tensor:
        return sharding.empty("ExpertParallelExperts", shape, self.mesh, device=device, dtype=dtype)

    def _mine(self, weight: Any) -> Any:
        """This rank's experts of a weight, for the exchange; its gradient is scaled if the mean is asked for."""
        if weight is None:
            return None
        local = weight.to_local()
        ranks = self.mesh.size()
        return Scale.apply(local, 1 / ranks) if self.gradients == "mean" and ranks > 1 else local

    def prepack(self, *, dtype: torch.dtype | None = None) -> Experts:
        """Not available: raises a RuntimeError."""
        raise RuntimeError("ExpertParallelExperts: prepack is not available for experts spread over ranks")

    def forward(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        *,
        capacity: int | None = None,
        drop_policy: str = "position",
        plan: Plan | None = None,
        shared: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`Experts.forward` over the ranks: y of this rank's tokens; every rank of the group must call.

        Args:
            x, weights, experts: this rank's tokens, as many as it has; none is fine.
            capacity, drop_policy: rows per expert of this rank's tokens, as in `moe_ops.plan`.
            plan: must be None.
            shared: is called while rows travel; what it gives, [tokens, hidden], is added to y.
        """
        if plan is not None:
            raise ValueError(f"ExpertParallelExperts: plan must be None, got {checks.kind(plan)}")
        if capacity is not None:
            ranks = weights if drop_policy == "probability" else None
            kept = ops.plan(experts, self.num_experts, capacity=capacity, drop_policy=drop_policy, weights=ranks)
            experts = torch.where(kept.slot_row >= 0, experts, -1)
        y = expert_parallel.moe_mlp(
            x,
            weights,
            experts,
            self._mine(self.w_in),
            self._mine(self.w_out),
            group=self.mesh.get_group(),
            num_experts=self.num_experts,
            mode=self.mode,
            name=self.name,
            rows_per_peer=self.rows_per_peer,
            chunks=self.chunks,
            shared=shared,
            b_in=self._mine(self.b_in),
            b_out=self._mine(self.b_out),
            **{name: getattr(self, name) for name in COMPUTE},
        )
        if self.rows_per_peer is not None:
            y, dropped = y
            self.dropped = self.dropped + dropped
        return y

    def extra_repr(self) -> str:
        options = f"mode={self.mode!r}, chunks={self.chunks}, gradients={self.gradients!r}"
        return f"{super().extra_repr()}, ranks={self.mesh.size()}, {options}"


def _generator_state(device_type: str) -> str:
    """A hash of the state of torch's default generator: where it differs, ranks would draw different weights."""
    state = torch.get_rng_state() if device_type == "cpu" else torch.get_device_module(device_type).get_rng_state()
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=4).hexdigest()
