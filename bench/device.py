"""What the benches need to know of the device they run on: how to time a launch, its roofs, its name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

ROOF_BYTES = 1 << 30  # far beyond any cache
ROOF_SIZE = 8192  # of the square matrices that measure arithmetic
HIDDEN_SECONDS = 5e-4  # of work for the device, so that the host is ahead when a launch is timed

Timer = Callable[[Callable[[], Any]], float]


def on_cuda() -> bool:
    return torch.get_default_device().type == "cuda"


def use_cuda() -> None:
    """Makes CUDA the default of all tensors; ends the program where that cannot be."""
    from moe_ops import cuda

    reason = cuda.missing() or ("" if torch.cuda.is_available() else "torch sees no GPU")
    if reason:
        sys.exit(f"--device cuda: {reason}")
    torch.set_default_device("cuda")


def name() -> str:
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.multi_processor_count} processors, torch's CUDA {torch.version.cuda}"


def last_level_cache() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 40 << 20


def wall_time(launch: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = launch()
    seconds = time.perf_counter() - start
    del result
    return seconds


class DeviceTime:
    """The time between two events around a launch. Before the first, the device fills memory beyond its cache: operands
    come from memory, and the host issues the launch meanwhile, so that its own time shows only where it waits for the
    device or takes longer than that.
    """

    def __init__(self) -> None:
        self.cold = torch.empty(4 * last_level_cache(), dtype=torch.uint8, device="cuda")
        self.fills = 1
        self.cold.zero_()
        once = _event_seconds(lambda: self.cold.zero_())
        self.fills = max(1, min(32, round(HIDDEN_SECONDS / once)))

    def __call__(self, launch: Callable[[], Any]) -> float:
        for _ in range(self.fills):
            self.cold.zero_()
        return _event_seconds(launch)


def _event_seconds(launch: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = launch()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3


def measure_roofs() -> dict[str, float]:
    """The best of a few launches of torch's own: products of square matrices by dtype (float32 without TF32), a sum
    and a copy of memory.
    """

    def best(launch: Callable[[], Any]) -> float:
        return min(_event_seconds(launch) for _ in range(4))

    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        n = ROOF_SIZE // {2: 1, 4: 2, 8: 8}[dtype.itemsize]
        a = torch.randn(n, n, device="cuda").to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2.0 * n**3 / best(lambda a=a: a @ a)  # type: ignore[misc]
    memory = torch.zeros(ROOF_BYTES // 4, device="cuda")
    other = torch.empty_like(memory)
    found["copy"] = 2 * ROOF_BYTES / best(lambda: other.copy_(memory))
    found["read"] = max(ROOF_BYTES / best(lambda: memory.sum()), found["copy"])
    return found
