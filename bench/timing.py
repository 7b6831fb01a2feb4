"""Times variants of one computation side by side: launch by launch in turn, so that all see the same machine."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import device
from device import Timer


@dataclass(frozen=True)
class Timing:
    median_s: float
    spread: float  # (90 % quantile - 10 % quantile) / median
    launches: int


def summarize(samples: Sequence[float]) -> Timing:
    median = statistics.median(samples)
    if len(samples) < 2:
        return Timing(median, 0.0, len(samples))
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(median, (deciles[-1] - deciles[0]) / median, len(samples))


def last_level_cache() -> int:
    """Bytes of the largest cache of the device; 32 MiB where the system does not tell that of the processor."""
    if device.on_cuda():
        return device.last_level_cache()
    largest = 0
    for entry in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = entry.read_text().strip()
        if text.endswith(("K", "M")):
            largest = max(largest, int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return largest or 32 << 20


def sets_to_stay_cold(bytes_per_set: int, times: float = 4, most: int = 512) -> int:
    """How many sets of operands, used in turn, exceed the last cache `times` over: each as cold as in a real model."""
    return max(1, min(most, -(-int(times * last_level_cache()) // max(1, bytes_per_set))))


def keep_freed_memory() -> bool:
    """Asks the C library to keep what is freed for the next allocation, as a caching allocator does; False where it
    cannot. Otherwise every large result is fresh memory, and the page faults of its first use, the same for all
    variants, outweigh a stage that is bound by memory.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def interleave(
    launches: dict[str, Callable[[int], Any]],
    *,
    sets: int = 1,
    budget_s: float,
    min_rounds: int = 3,
    max_rounds: int = 300,
    advance: Callable[[int, int], None] = lambda done, rounds: None,
    timer: Timer = device.wall_time,
) -> dict[str, Timing]:
    """Times launches[name](set), one launch of each per round in a shuffled order, for budget_s seconds.

    No round is begun that would end later, but for the first min_rounds. Every launch takes the set of operands that
    was used longest ago. advance(done, rounds) is called after each round.
    """
    next_set = 0

    def timed(launch: Callable[[int], Any]) -> float:
        nonlocal next_set
        seconds = timer(lambda: launch(next_set))
        next_set = (next_set + 1) % sets
        return seconds

    turns: list[dict[str, float]] = []
    order = list(launches)
    shuffle = random.Random(0).shuffle
    collects = gc.isenabled()
    gc.disable()
    now = time.perf_counter()
    ends_at = now + budget_s
    try:
        while len(turns) <= max_rounds:
            begun = now
            shuffle(order)
            turns.append({name: timed(launches[name]) for name in order})
            now = time.perf_counter()
            more = max(0, int((ends_at - now) / max(now - begun, 1e-9)))
            advance(len(turns), len(turns) + more)
            if more == 0 and len(turns) >= min_rounds:
                break
    finally:
        if collects:
            gc.enable()
    if len(turns) > min_rounds:
        del turns[0]  # it warmed up what the check before has not
    return {name: summarize([turn[name] for turn in turns]) for name in launches}
