"""The counts that ranks tell each other before rows travel, and a hash of what they must agree on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ops.exchange.failure import failed
from moe_ops.exchange.wire import Wire, resolve_group

MAX_CHUNKS = 32  # the message has one size, so that ranks that disagree on chunks still understand each other


def exchange_counts(
    counts: Tensor, sizes: dict[str, int], options: dict[str, Any], wire: Wire
) -> tuple[list[Any], list[Any]]:
    """Tells each rank how much it will get, and compares the configuration. The one host synchronisation.

    Args:
        counts: [W, N] int64, N numbers for each rank.
        sizes, options: what all ranks must agree on, by name; what torch.compile may turn into a symbol is a size.

    Returns:
        (sent, received): what counts holds, and what came: for each of the N numbers its W values, as ints.

    Raises:
        ValueError: the configurations differ, on every rank.
        RuntimeError: the exchange failed.
    """
    operator = torch.ops.moe_ops_exchange.counts if torch.compiler.is_compiling() else _exchange
    texts = "\n".join(f"{name}={value}" for name, value in options.items())
    both = operator(counts, texts, "\n".join(sizes), list(sizes.values()), *wire)
    sent, received = both.transpose(1, 2).tolist()
    for row in (*sent, *received):
        for value in row:
            torch._check(value >= 0)
    return sent, received


def agree(sizes: dict[str, int], options: dict[str, Any], wire: Wire, device: torch.device) -> None:
    """Compares the configuration where nothing else is exchanged, and where that keeps no device waiting: on a CPU.

    Gloo ends a process that gets more bytes than it expects. Not in a compiled graph, which drops what nobody reads.
    """
    if device.type == "cpu" and not torch.compiler.is_compiling():
        exchange_counts(torch.zeros(wire.world, 0, dtype=torch.int64), sizes, options, wire)


def _exchange(
    counts: Tensor, texts: str, names: str, sizes: list[int], group: str, rank: int, world: int, label: str
) -> Tensor:
    """[2, W, N] int64 on the CPU: counts, and what came."""
    told = "\n".join(
        [f"call={label!r}", *(f"{name}={size}" for name, size in zip(names.split("\n"), sizes, strict=True)), texts]
    )
    wire = Wire(group, rank, world, label)
    each = counts.shape[1]
    message = counts.new_zeros(world, 1 + 2 * MAX_CHUNKS)
    digest = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=7).digest(), "little")
    message[:, 0] = digest
    message[:, 1 : 1 + each] = counts
    answer = torch.empty_like(message)
    resolved: Any = resolve_group(group)
    try:
        dist.all_to_all_single(answer, message, group=resolved)
        both = torch.stack([message, answer]).cpu()
        if bool((both[1, :, 0] == digest).all()):
            return both[:, :, 1 : 1 + each].contiguous()
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, told, group=resolved)
    except RuntimeError as error:
        raise failed(wire, error) from error
    said = [dict(line.split("=", 1) for line in each.splitlines()) for each in everyone]
    raise ValueError(f"{label}: all ranks must agree, got {differences(said, dist.get_process_group_ranks(resolved))}")


def differences(said: list[dict[str, str]], ranks: list[int]) -> str:
    """Which fields are not the same on all ranks, and who of them, numbered as in the whole job, has what."""
    texts = []
    for name in dict.fromkeys(name for each in said for name in each):
        values: dict[str, list[str]] = {}
        for rank, each in zip(ranks, said, strict=True):
            values.setdefault(each.get(name, "nothing"), []).append(str(rank))
        if len(values) > 1:
            whose = (f"{value} on rank{'s' * (len(on) > 1)} {', '.join(on)}" for value, on in values.items())
            texts.append(f"{name} " + " and ".join(whose))
    return "; ".join(texts)


_counts = torch.library.custom_op("moe_ops_exchange::counts", _exchange, mutates_args=())


@_counts.register_fake
def _(
    counts: Tensor, texts: str, names: str, sizes: list[int], group: str, rank: int, world: int, label: str
) -> Tensor:
    return counts.new_empty(2, *counts.shape, device="cpu")
