"""What all ranks of a group must agree on is compared when a layer is built, not found out by a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from moe_ops.exchange.agreement import differences
from moe_ops.exchange.failure import failed
from moe_ops.exchange.wire import Wire


def handshake(label: str, group: Any, device: torch.device, fields: Mapping[str, Any]) -> None:
    """Compares a hash of the fields over the group; every rank must call, and where they differ every rank raises.

    Args:
        label: names the layer in errors.
        group: the process group.
        device: where tensors of the group's collectives live.
        fields: names and values; values are compared by their repr.

    Raises:
        ValueError: the fields differ. The text says which, and what each rank has.
        RuntimeError: the exchange failed: a rank died, or does not build this layer.
    """
    said = {name: repr(value) for name, value in fields.items()}
    digest = hashlib.blake2b(repr(sorted(said.items())).encode(), digest_size=8).digest()
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    rank, world = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    hashes = [torch.empty_like(mine) for _ in range(world)]
    everyone: list[Any] = [None] * world
    try:
        torch.distributed.all_gather(hashes, mine, group=group)
        if bool((torch.cat(hashes) == mine).all()):
            return
        torch.distributed.all_gather_object(everyone, said, group=group)
    except RuntimeError as error:
        raise failed(Wire(group.group_name, rank, world, f"building {label}"), error) from error
    raise ValueError(
        f"{label}: all ranks must agree, got {differences(everyone, torch.distributed.get_process_group_ranks(group))}"
    )
