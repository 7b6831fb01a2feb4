"""permute: the tokens' rows in expert order. Bound by copying; its backward is a sum of K rows per token.

python bench/bench_permute.py --shape mixtral-8x7b --dtype bfloat16
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


def bench_permute(report: Report, s: Shape, dtype: torch.dtype) -> None:
    experts = torch.randn(s.tokens, s.experts).topk(s.top_k, dim=-1).indices.int()
    plan = moe_ops.plan(experts, s.experts)
    _, row_slot = peers.plan(experts, s.experts)
    token = row_slot // s.top_k

    def index(x: Tensor) -> Tensor:
        return x[token]

    count = sets_to_stay_cold(s.tokens * s.hidden * dtype.itemsize, most=64)
    time_both_passes(
        report,
        "permute",
        s,
        dtype,
        {
            OURS: lambda x: moe_ops.permute(x, plan),
            "x[token]": index,
            "index_select": lambda x: x.index_select(0, token),
        },
        [(torch.randn(s.tokens, s.hidden, dtype=dtype),) for _ in range(count)],
        torch.randn(s.rows, s.hidden, dtype=dtype),
        exact=index,
        work=roofline.permute(s, dtype.itemsize),
        backward_work=roofline.permute_backward(s, dtype.itemsize),
    )


def main() -> None:
    report = Report(parse_args("permute"))
    for shape, dtype in report.cases():
        bench_permute(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
