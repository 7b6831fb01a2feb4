"""What a failed collective is told as: which operation of which layer, on which rank, and which ranks are silent."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

GRACE = 0.3  # seconds in which the other ranks can report their own failure


def failed(wire: Any, error: RuntimeError) -> RuntimeError:
    """The exception for a collective that raised `error` on this rank.

    Every rank that fails says so in the store the group was made with; who has not within GRACE is named.
    """
    where = f"{wire.label}: the exchange between ranks failed on rank {wire.rank} of {wire.world}"
    return RuntimeError(f"{where}{_silent(wire)}: {error}")


def _silent(wire: Any) -> str:
    try:
        store = dist.distributed_c10d._get_default_store()
        key = f"moe_ops/failed/{wire.group}"
        store.set(f"{key}/{wire.rank}", "")
        deadline = time.monotonic() + GRACE
        missing = [rank for rank in range(wire.world) if rank != wire.rank]
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
            time.sleep(0.02)
    except Exception:  # the store may have gone with the rank that held it
        return ""
    if not missing:
        return ""
    return f"; rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} did not answer"
