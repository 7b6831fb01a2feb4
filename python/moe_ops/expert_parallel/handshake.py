"""What all ranks of a group must agree on is compared when a layer is built, not found out by a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def handshake(op: str, group: Any, device: torch.device, fields: Mapping[str, Any]) -> None:
    """Compares a hash of the fields over the group; every rank must call, and where they differ every rank raises.

    Args:
        op: names the layer in the error.
        group: the process group.
        device: where tensors of the group's collectives live.
        fields: names and values; values are compared by their repr.

    Raises:
        ValueError: the fields differ. The text says which, and what each rank has.
    """
    said = {name: repr(value) for name, value in fields.items()}
    digest = hashlib.blake2b(repr(sorted(said.items())).encode(), digest_size=8).digest()
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    world = torch.distributed.get_world_size(group)
    hashes = [torch.empty_like(mine) for _ in range(world)]
    torch.distributed.all_gather(hashes, mine, group=group)
    if bool((torch.cat(hashes) == mine).all()):
        return
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, said, group=group)
    names = list(dict.fromkeys(name for each in everyone for name in each))
    differ = [name for name in names if len({each.get(name, "nothing") for each in everyone}) > 1]
    raise ValueError(f"{op}: all ranks must agree, got " + "; ".join(_who_has_what(name, everyone) for name in differ))


def _who_has_what(name: str, everyone: list[dict[str, str]]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(everyone):
        ranks.setdefault(each.get(name, "nothing"), []).append(rank)
    values = (f"{value} on rank{'s' * (len(on) > 1)} {', '.join(map(str, on))}" for value, on in ranks.items())
    return f"{name} " + " and ".join(values)
