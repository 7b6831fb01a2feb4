"""grouped_gemm: the first product of a layer, rows [R, H] by each expert's w_in [2I or I, H], without an epilogue.

    python bench/bench_grouped_gemm.py --shape qwen3-slice --dtype bfloat16

Bound by arithmetic when an expert has many rows, by reading the weights once when it has few.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import moe_ops
import peers
import roofline
from passes import time_both_passes
from report import OURS, PREPACKED, Report, parse_args
from shapes import Shape
from timing import sets_to_stay_cold


def bench_grouped_gemm(report: Report, s: Shape, dtype: torch.dtype) -> None:
    n, k = roofline.pre_width(s), s.hidden
    experts = torch.randn(s.tokens, s.experts).topk(s.top_k, dim=-1).indices
    offsets, _ = peers.plan(experts, s.experts)
    active = len(experts.unique())

    def loop(rows: Tensor, w: Tensor) -> Tensor:
        return peers.loop_gemm(rows, w, offsets.tolist())

    variants: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        OURS: lambda rows, w: moe_ops.grouped_gemm(rows, w, offsets),
        "loop over experts": loop,
    }
    missing = {}
    if hasattr(F, "grouped_mm"):
        variants["torch grouped_mm"] = lambda rows, w: F.grouped_mm(rows, w.transpose(1, 2), offs=offsets[1:])
    else:
        missing["torch grouped_mm"] = f"torch {torch.__version__} has none"

    count = sets_to_stay_cold(s.experts * n * k * dtype.itemsize)
    sets = [
        (torch.randn(s.rows, k, dtype=dtype), torch.randn(s.experts, n, k, dtype=dtype) / k**0.5) for _ in range(count)
    ]
    packed = [moe_ops.prepack(w) for _, w in sets]
    time_both_passes(
        report,
        "grouped_gemm",
        s,
        dtype,
        variants,
        sets,
        torch.randn(s.rows, n, dtype=dtype),
        exact=loop,
        work=roofline.grouped_gemm(s, dtype.itemsize, n, k, active),
        backward_work=roofline.grouped_gemm_backward(s, dtype.itemsize, n, k, active),
        missing=missing,
        inference={PREPACKED: lambda i: moe_ops.grouped_gemm(sets[i][0], packed[i], offsets)},
    )


def main() -> None:
    report = Report(parse_args("grouped_gemm"))
    for shape, dtype in report.cases():
        bench_grouped_gemm(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
