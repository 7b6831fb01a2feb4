"""From tokens and their experts to what travels: one row for each token and each rank that has experts of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops import ops
from moe_ops.types import Plan


def owned(num_experts: int, rank: int, world: int) -> tuple[int, int]:
    """The experts of a rank, first and one past the last: torch.chunk's cut, so that the last ranks may have none."""
    each = -(-num_experts // world)
    return min(rank * each, num_experts), min((rank + 1) * each, num_experts)


class Outgoing(NamedTuple):
    """A plan over ranks, and how much it sends.

    Attributes:
        experts: [T, K] int32, -1 for ids out of range.
        plan: offsets [W + 1], row_slot [T * K], slot_row [T, K]; the second slot of a token on one rank is dropped.
        counts: [W, 2] int64, rows and slots to each rank.
        wanted: [] int64, rows before any capacity.
    """

    experts: Tensor
    plan: Plan
    counts: Tensor
    wanted: Tensor


def outgoing(experts: Tensor, num_experts: int, world: int, capacity: int | None = None) -> Outgoing:
    """Plans the rows that experts [T, K] send to each of W ranks."""
    each = -(-num_experts // world)
    experts = torch.where((experts >= 0) & (experts < num_experts), experts, -1).int()
    ranks = experts.div(each, rounding_mode="floor")  # [T, K]; -1 stays
    again = (ranks.unsqueeze(2) == ranks.unsqueeze(1)).tril(-1).any(2)  # an earlier slot goes to this rank
    once = ranks.masked_fill(again, -1)
    plan = ops.plan(once, world, capacity=capacity)
    slots = ops.plan(ranks, world).counts
    return Outgoing(experts, plan, torch.stack([plan.counts, slots], 1).long(), (once >= 0).sum())


def trimmed(plan: Plan, rows: int) -> Plan:
    """The plan without the dropped rows behind its last expert."""
    # Not a slice, whose size torch.compile would take to be min(rows, R).
    return plan._replace(row_slot=plan.row_slot.split([rows, plan.row_slot.shape[0] - rows])[0])


def padded(plan: Plan, rows: int) -> Plan:
    """The plan with exactly `rows` rows for each of its W ranks; plan has no more for any. Fillers are dropped rows."""
    world = plan.counts.shape[0]
    place = torch.arange(rows, device=plan.offsets.device)
    filled = place < plan.counts.unsqueeze(1)  # [W, rows]
    row = plan.offsets[:-1].unsqueeze(1) + place
    row_slot = torch.nn.functional.pad(plan.row_slot, (0, 1))  # so that there is something to read
    row_slot = torch.where(filled, row_slot[row.clamp(max=plan.row_slot.shape[0])], -1).flatten().int()
    rank = torch.searchsorted(plan.offsets[1:], plan.slot_row.clamp(min=0), right=True).clamp(max=world - 1)
    shift = torch.arange(world, device=rank.device) * rows - plan.offsets[:-1]
    slot_row = torch.where(plan.slot_row >= 0, plan.slot_row + shift[rank], -1).int()
    offsets = torch.arange(world + 1, device=rank.device, dtype=torch.int32) * rows
    return Plan(offsets, row_slot, slot_row, plan.counts)
