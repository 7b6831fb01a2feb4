"""Puts what bench/gpu_check.sh has found into <results>/<gpu>.md and .json, predicted times beside the measured ones.

python bench/gpu_report.py LOGS RESULTS
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

OURS = "moe_ops"
Row = dict[str, Any]


def read_steps(logs: Path) -> list[list[str]]:
    """Name, outcome and detail of each step."""
    path = logs / "steps.tsv"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [[*line.split("\t"), "", ""][:3] for line in lines]


def read_rows(logs: Path) -> list[Row]:
    """The benches' rows; a file that a stopped bench left half written is passed over."""
    rows: list[Row] = []
    for path in sorted(logs.glob("bench_*.json")):
        try:
            rows += json.loads(path.read_text())
        except ValueError:
            print(f"{path.name}: not complete, passed over")
    return rows


def add_predictions(rows: list[Row], device_name: str) -> str:
    """Sets `predicted_s` of our own rows; says of which card, or why there are none."""
    if not rows:
        return "No time is predicted: no bench has ended."
    from predict import card_of, stages  # these need moe_ops, which is not there where the build has failed
    from shapes import STANDING

    card = card_of(device_name)
    shapes = {str(shape): shape for shape in STANDING.values()}
    for row in rows:
        row["predicted_s"] = None
        if card and row["variant"] == OURS and row["shape"] in shapes:
            size = 4 if row["dtype"] == "float32" else 2
            row["predicted_s"] = stages(card, shapes[row["shape"]], size).get(row["name"])
    if card is None:
        return f"No time is predicted: the peaks of {device_name} are not in bench/predict.py."
    return f"Predicted: by bench/predict.py for {card.title}, from bytes, FLOPs, tiles and launches; not measured."


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.4g}"


def markdown(device_name: str, steps: list[list[str]], rows: list[Row], note: str) -> str:
    lines = [f"# {device_name}", "", "| step | outcome | |", "| --- | --- | --- |"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in step)} |" for step in steps]
    if not rows:
        return "\n".join([*lines, "", "Nothing was timed.", ""])
    lines += [
        "",
        note,
        "",
        "Measured: medians between events on the device, operands out of the cache, in ms; roof: by the",
    ]
    lines += ["products, sums and copies of torch itself that were measured in the same run.", ""]
    lines += ["| stage | shape | dtype | variant | measured | spread | predicted | of the roof | against moe_ops |"]
    lines += ["| --- " * 9 + "|"]
    ours = {(row["name"], row["shape"], row["dtype"]): row["median_s"] for row in rows if row["variant"] == OURS}
    for row in rows:
        own = ours.get((row["name"], row["shape"], row["dtype"]))
        cells = (
            row["name"],
            row["shape"],
            row["dtype"],
            row["variant"],
            milliseconds(row["median_s"]),
            f"{row['spread']:.0%}",
            milliseconds(row["predicted_s"]),
            f"{row['fraction_of_roof']:.0%}",
            f"{row['median_s'] / own:.2f}x" if own else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    logs, results = Path(sys.argv[1]), Path(sys.argv[2])
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    steps, rows = read_steps(logs), read_rows(logs)
    note = add_predictions(rows, device_name)
    text = markdown(device_name, steps, rows, note)
    print(text)
    if device_name == "no GPU":
        print("Nothing is written: there was no GPU.")
        return
    results.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    (results / f"{stem}.md").write_text(text)
    facts = {"device": device_name, "steps": steps, "rows": rows, "predictions": note}
    (results / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {results / stem}.md and .json")


if __name__ == "__main__":
    main()
