"""plan: the stable sort of all slots by expert. A large one is bound by reading ids and writing both maps.

python bench/bench_plan.py --shape qwen3-30b
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
import peers
import roofline
from report import OURS, Report, Variant, parse_args
from shapes import Shape
from timing import sets_to_stay_cold

Maps = tuple[Tensor, Tensor, Tensor, Tensor]  # offsets, row_slot, slot_row, counts


def with_argsort(experts: Tensor, num_experts: int) -> Maps:
    offsets, row_slot = peers.plan(experts, num_experts)
    return offsets, row_slot, peers.inverse(row_slot).view_as(experts), offsets.diff()


def with_one_hot(experts: Tensor, num_experts: int) -> Maps:
    """The place of a slot within its expert as a running count over a one-hot matrix [R, E]."""
    one_hot = F.one_hot(experts.flatten().long(), num_experts).int()
    counts = one_hot.sum(0, dtype=torch.int32)
    offsets = F.pad(counts.cumsum(0), (1, 0)).int()
    place = (one_hot.cumsum(0) - 1 + offsets[:-1]).gather(1, experts.flatten().long()[:, None])[:, 0]
    return offsets, peers.inverse(place), place.view_as(experts), counts


def bench_plan(report: Report, s: Shape, dtype: torch.dtype) -> None:
    count = sets_to_stay_cold(3 * s.rows * roofline.INDEX)
    sets = [torch.randn(s.tokens, s.experts).topk(s.top_k, dim=-1).indices.to(dtype) for _ in range(count)]
    expected = with_argsort(sets[0], s.experts)

    def check(maps: Maps) -> float:
        return (
            0.0 if all(torch.equal(a.long(), b.long()) for a, b in zip(maps, expected, strict=True)) else float("inf")
        )

    functions = {OURS: moe_ops.plan, "argsort": with_argsort, "one-hot, cumsum": with_one_hot}
    variants = [
        Variant(name, lambda i, function=function: function(sets[i], s.experts), check, roofline.plan(s))
        for name, function in functions.items()
    ]
    report.table("plan", s, dtype, variants, sets=count)


def main() -> None:
    args = parse_args("plan")
    args.dtype = ["int32"]
    report = Report(args, tables_per_case=1)
    for shape, dtype in report.cases():
        bench_plan(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
