"""What a failed collective is told as: which operation of which layer, on which rank, and which ranks are silent."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

GRACE = 0.3  # seconds in which the other ranks can report their own failure


def failed(wire: Any, error: RuntimeError) -> RuntimeError:
    """The exception for a collective that raised `error` on this rank.

    Every rank that fails says so in the store the group was made with; who has not within GRACE is named. Ranks are
    numbered as in the whole job, also where the group is a part of it.
    """
    c10d: Any = dist.distributed_c10d
    numbers = dist.get_process_group_ranks(c10d._resolve_process_group(wire.group))
    among = wire.world if wire.world == dist.get_world_size() else f"the group {numbers}"
    where = f"{wire.label}: the exchange between ranks failed on rank {numbers[wire.rank]} of {among}"
    return RuntimeError(f"{where}{_silent(wire, numbers)}: {error}")


def _silent(wire: Any, numbers: list[int]) -> str:
    missing: list[int] = []
    # The store may hang with the rank that holds it, and has no timeout of its own.
    asking = threading.Thread(target=_ask, args=(wire, missing), daemon=True)
    asking.start()
    asking.join(2 * GRACE)
    if asking.is_alive() or not missing:
        return ""
    return f"; rank{'s' * (len(missing) > 1)} {', '.join(str(numbers[rank]) for rank in missing)} did not answer"


def _ask(wire: Any, missing: list[int]) -> None:
    """Says in the store that this rank failed; fills missing with the ranks that do not say so."""
    try:
        store = dist.distributed_c10d._get_default_store()
        key = f"moe_ops/failed/{wire.group}"
        store.set(f"{key}/{wire.rank}", "")
        deadline = time.monotonic() + GRACE
        silent = [rank for rank in range(wire.world) if rank != wire.rank]
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"{key}/{rank}"])]
            time.sleep(0.02)
    except Exception:  # the store may have gone with the rank that held it
        return
    missing.extend(silent)
