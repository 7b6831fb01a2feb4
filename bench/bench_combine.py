"""combine: each token's weighted sum of its rows. Bound by reading the rows.

python bench/bench_combine.py --shape mixtral-8x7b --dtype bfloat16
"""

from __future__ import annotations

import torch
from torch import Tensor

import moe_ops
import peers
import roofline
from passes import time_both_passes
from report import OURS, Report, parse_args
from shapes import Shape
from timing import sets_to_stay_cold


def bench_combine(report: Report, s: Shape, dtype: torch.dtype) -> None:
    experts = torch.randn(s.tokens, s.experts).topk(s.top_k, dim=-1).indices.int()
    plan = moe_ops.plan(experts, s.experts)
    _, row_slot = peers.plan(experts, s.experts)
    token, slot_row = row_slot // s.top_k, peers.inverse(row_slot)

    def by_slot(rows: Tensor, weights: Tensor) -> Tensor:
        parts = rows[slot_row].view(s.tokens, s.top_k, s.hidden)
        return (parts * weights[:, :, None]).sum(dim=1).to(rows.dtype)

    def index_add(rows: Tensor, weights: Tensor) -> Tensor:
        weighted = (rows * weights.flatten()[row_slot, None]).to(rows.dtype)
        return rows.new_zeros(s.tokens, s.hidden).index_add_(0, token, weighted)

    def operands() -> tuple[Tensor, Tensor]:
        weights = torch.rand(s.tokens, s.top_k, dtype=peers.compute_dtype(dtype))
        return torch.randn(s.rows, s.hidden, dtype=dtype), weights / weights.sum(dim=-1, keepdim=True)

    count = sets_to_stay_cold(s.rows * s.hidden * dtype.itemsize, most=64)
    time_both_passes(
        report,
        "combine",
        s,
        dtype,
        {
            OURS: lambda rows, weights: moe_ops.combine(rows, weights, plan),
            "rows by slot, sum": by_slot,
            "index_add": index_add,
        },
        [operands() for _ in range(count)],
        torch.randn(s.tokens, s.hidden, dtype=dtype),
        exact=by_slot,
        work=roofline.combine(s, dtype.itemsize),
        backward_work=roofline.combine_backward(s, dtype.itemsize),
    )


def main() -> None:
    report = Report(parse_args("combine"))
    for shape, dtype in report.cases():
        bench_combine(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
