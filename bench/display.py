"""How a bench shows its progress and its table: with rich where it is installed, in plain text otherwise."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import device

if TYPE_CHECKING:
    from report import Row
    from timing import Timing

HEADINGS = ("variant", "median", "spread", "rate", "roof", "% of roof", "vs moe_ops", "max error", "launches")


def processor() -> str:
    if device.on_cuda():
        return device.name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def table_line(row: Row, timing: Timing, rate: str, ratio: float, error: float | None) -> tuple[str, ...]:
    return (
        row.variant,
        duration(row.median_s),
        f"{row.spread:.0%}",
        rate,
        duration(row.roof),
        f"{row.fraction_of_roof:.1%}",
        f"{ratio:.2f}x",
        "-" if error is None else f"{error:.1e}",
        str(timing.launches),
    )


def print_table(lines: Sequence[tuple[str, ...]], bold: str) -> None:
    """One line for each variant; `bold` is the one to stand out."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(line[i]) for line in [HEADINGS, *lines]) for i in range(len(HEADINGS))]
        for line in [HEADINGS, *lines]:
            first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join((first.strip().ljust(widths[0]), *others)))
    else:
        table = Table(box=None, pad_edge=False)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading == "variant" else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line, style="bold" if line[0] == bold else None)
        width = None if sys.stdout.isatty() else 130
        Console(markup=False, highlight=False, width=width).print(table)


@contextmanager
def progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar where there is rich and a terminal; otherwise a line every five seconds."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            pass
        else:
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(name, total=None)
                yield lambda done, rounds: bar.update(task, completed=done, total=rounds)
            return
    last = time.monotonic()

    def tell(done: int, rounds: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"  {name}: round {done} of {rounds}", file=sys.stderr, flush=True)

    yield tell
