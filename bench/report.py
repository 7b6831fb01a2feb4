"""What all benches share: arguments, the check before a timing, the table, JSON and the plot."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import device
import shapes
from display import print_table, processor, progress, table_line
from roofline import Roofs, Work
from shapes import Shape
from timing import Timing, interleave, keep_freed_memory, last_level_cache, summarize

OURS = "moe_ops"
PREPACKED = "moe_ops, prepacked"

# The largest error of a result, relative to its largest value, beyond which a variant computes something else.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2, "int32": 0}

QUICK_SECONDS = 38  # of --quick, after the imports: each table gets its share of what is left


@dataclass(frozen=True)
class Variant:
    name: str
    run: Callable[[int], Any]  # launches on one set of operands
    check: Callable[[Any], float] | None  # the largest relative error of a result of set 0; None: it computes nothing
    work: Work


@dataclass(frozen=True)
class Row:
    """One line of the results; roof is the time in seconds that the measured roofs allow for the work."""

    name: str
    variant: str
    dtype: str
    shape: str
    median_s: float
    spread: float
    roof: float
    fraction_of_roof: float


def relative_error(results: Any, expected: Any) -> float:
    """The largest |result - expected| / max |expected| over one tensor or a sequence of them; infinity for a NaN."""
    if isinstance(results, torch.Tensor):
        results, expected = (results,), (expected,)
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        if result.shape != wanted.shape:
            return float("inf")
        if wanted.numel():
            parts = zip(result.detach().unbind(), wanted.unbind(), strict=True)  # of a weight one expert at a time
            difference = torch.stack([(got.double() - exact).abs().max() for got, exact in parts]).max()
            error = difference / wanted.abs().max().clamp_min(1e-30)
            worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst


def parse_args(verb: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    text = (
        f"Checks and times {verb}. Each row: median of interleaved launches, spread (10 to 90 % quantile, over the "
        "median), and the fraction of the machine's roof, measured in the same run."
    )
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--quick", action="store_true", help="small shapes, float32; ends within a minute on 2 cores")
    known = ", ".join(shapes.STANDING)
    parser.add_argument("--shape", action="append", type=_shape, help=f"T,H,I,E,K or one of: {known}; may be repeated")
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16", "float64"), help="may be repeated"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument(
        "--keep-memory", action="store_true", help="reuse freed memory, so that no page faults are timed (glibc)"
    )
    parser.add_argument("--seconds", type=float, help="time for each table (default: 3 with --quick, otherwise 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of objects")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the times and roofs (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.plot and find_spec("matplotlib") is None:
        parser.error("argument --plot: needs matplotlib: pip install matplotlib")
    if args.device == "cuda" and "float64" in (args.dtype or ()):
        parser.error("argument --dtype: float64 is supported on the CPU only")
    default = shapes.CUDA if args.device == "cuda" else shapes.DEFAULT
    names = (shapes.QUICK if args.quick else default)[verb]
    args.shape = args.shape or [shapes.STANDING[name] for name in names]
    args.dtype = args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"])
    args.seconds = args.seconds or (3.0 if args.quick else 15.0)
    return args


def _shape(text: str) -> Shape:
    try:
        return shapes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class Report:
    """Runs the tables of one bench: checks each variant, times them together, prints, and collects the rows."""

    def __init__(self, args: argparse.Namespace, tables_per_case: int = 2):
        import moe_ops
        from moe_ops import _C

        self.args = args
        self.results: list[tuple[Row, Work]] = []
        self.tables_left = len(args.shape) * len(args.dtype) * tables_per_case
        self.ends_at = time.monotonic() + (QUICK_SECONDS if args.quick else float("inf"))
        self.timer: device.Timer = device.wall_time
        if args.device == "cuda":
            device.use_cuda()
            self.timer = device.DeviceTime()
        kept = args.keep_memory and keep_freed_memory()
        if args.threads:
            torch.set_num_threads(args.threads)
        self.roofs = Roofs.measure(last_level_cache())
        version = getattr(moe_ops, "__version__", "unknown")
        print(f"moe_ops {version}, torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}")
        note = ", freed memory is kept" if kept else ""
        host = f", {torch.get_num_threads()} threads, {_C.instruction_set()}{note}"
        print(processor() + (", times of events" if device.on_cuda() else host))
        print(self.roofs.describe())

    def cases(self) -> Iterator[tuple[Shape, torch.dtype]]:
        for shape in self.args.shape:
            for dtype in self.args.dtype:
                torch.manual_seed(0)
                yield shape, getattr(torch, dtype)

    def table(
        self,
        name: str,
        shape: Shape,
        dtype: torch.dtype,
        variants: Sequence[Variant],
        *,
        sets: int = 1,
        missing: dict[str, str] | None = None,
    ) -> None:
        """missing: variants that are not there, and why."""
        type_name = str(dtype).removeprefix("torch.")
        print(f"\n{name}  {shape}  {type_name}")
        begun = time.monotonic()
        share = (self.ends_at - begun) / max(self.tables_left, 1)
        self.tables_left -= 1
        errors, timings, notes = self._check(name, shape, type_name, variants)
        notes = {**(missing or {}), **notes}
        ready = [variant for variant in variants if variant.name in errors]
        budget = min(self.args.seconds, begun + share - time.monotonic())
        if budget > 0:
            with progress(name) as advance:
                launches = {variant.name: variant.run for variant in ready}
                min_rounds = 1 if self.args.quick else 3
                timings = interleave(
                    launches, sets=sets, budget_s=budget, min_rounds=min_rounds, advance=advance, timer=self.timer
                )
        else:
            print("no time is left of --quick: these are the launches of the check; is the machine busy?")
        self.roofs = self.roofs.higher(Roofs.measure(last_level_cache(), seconds=0.05))
        lines = []
        for variant in ready:
            timing = timings[variant.name]
            row = Row(name, variant.name, type_name, str(shape), timing.median_s, timing.spread, 0, 0)
            row = self._against_roof(row, variant.work)
            self.results.append((row, variant.work))
            ratio = timing.median_s / timings[OURS].median_s if OURS in timings else float("nan")
            rate = self.roofs.rate(variant.work, type_name, timing.median_s)
            lines.append(table_line(row, timing, rate, ratio, errors[variant.name] if variant.check else None))
        print_table(lines, bold=OURS)
        for variant_name, reason in notes.items():
            print(f"{variant_name}: not run: {reason}", flush=True)
        self._write_json()  # also of a run that is stopped

    def _check(
        self, name: str, shape: Shape, dtype: str, variants: Sequence[Variant]
    ) -> tuple[dict[str, float], dict[str, Timing], dict[str, str]]:
        """The error and time of each variant, the reason of those that refuse; ends the run where one is wrong."""
        errors: dict[str, float] = {}
        timings: dict[str, Timing] = {}
        refusals: dict[str, str] = {}
        allowed = TOLERANCE[dtype]
        for variant in variants:
            results: list[Any] = []
            try:
                seconds = self.timer(lambda run=variant.run, to=results: to.append(run(0)))  # type: ignore[misc]
                timings[variant.name] = summarize([seconds])
                error = variant.check(results.pop()) if variant.check else 0.0
            except (RuntimeError, NotImplementedError) as refusal:
                if variant.name == OURS:
                    raise
                refusals[variant.name] = str(refusal).strip().splitlines()[0][:90]
                continue
            if not error <= allowed:
                sys.exit(
                    f"check failed: {name}, {variant.name}, {shape}, {dtype}: max error {error:.2e} against a float64 "
                    f"reference, allowed {allowed:.0e}; nothing was timed"
                )
            errors[variant.name] = error
        found = f"max error {max(errors.values()):.1e} (allowed {allowed:.0e})" if allowed else "max error 0 (integers)"
        checked = sum(variant.check is not None for variant in variants if variant.name in errors)
        print(f"checked: {found} of {checked} variants, relative to the largest value of a float64 reference")
        return errors, timings, refusals

    def _against_roof(self, row: Row, work: Work) -> Row:
        roof = self.roofs.seconds(work, row.dtype)
        return replace(row, roof=roof, fraction_of_roof=roof / row.median_s)

    def _write_json(self) -> list[Row]:
        rows = [self._against_roof(row, work) for row, work in self.results]
        if self.args.json:
            self.args.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")
        return rows

    def finish(self) -> None:
        """Writes the files, with all rows against the highest roofs that were measured during the run."""
        rows = self._write_json()
        print(f"\nat the end, {self.roofs.describe()}")
        if self.args.json:
            print(f"wrote {self.args.json}")
        if self.args.plot:
            from plot import draw

            draw(rows, self.args.plot, f"{processor()}, {torch.get_num_threads()} threads")
            print(f"wrote {self.args.plot}")
