"""Draws the rows of a bench: a bar of time for each variant, and on it the time that the roof allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from report import Row


def draw(rows: Sequence[Row], path: Path, machine: str) -> None:
    """One panel for each computation (name and dtype), one group of bars for each shape."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.name, row.dtype) for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    colour = {variant: f"C{i}" for i, variant in enumerate(variants)}
    width = 0.8 / max(1, len(variants))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(10, 3.2 * max(1, len(panels)) + 0.6), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        here = [row for row in rows if (row.name, row.dtype) == panel]
        shapes = list(dict.fromkeys(row.shape for row in here))
        for row in here:
            at = shapes.index(row.shape) + (variants.index(row.variant) - (len(variants) - 1) / 2) * width
            axis.bar(at, row.median_s * 1e3, width * 0.92, color=colour[row.variant])
            axis.hlines(row.roof * 1e3, at - width / 2, at + width / 2, color="black", linewidth=2)
        axis.set_yscale("log")
        axis.set_ylabel("ms")
        axis.set_title(f"{panel[0]}, {panel[1]}", loc="left", fontsize=10)
        axis.set_xticks(range(len(shapes)), [shape.replace(" ", "\n", 1) for shape in shapes], fontsize=8)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour[variant]) for variant in variants]
    handles.append(pyplot.Line2D([], [], color="black", linewidth=2))
    figure.legend(handles, [*variants, "roof"], loc="upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.text(0.99, 0.005, machine, ha="right", fontsize=7)
    figure.tight_layout(rect=(0, 0.01, 1, 1 - 0.3 / figure.get_figheight()))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
