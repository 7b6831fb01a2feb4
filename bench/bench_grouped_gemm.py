"""grouped_gemm: the first product of a layer, rows [R, H] by each expert's w_in [2I or I, H], without an epilogue; and
its two gradients, each alone.

    python bench/bench_grouped_gemm.py --shape qwen3-slice --dtype bfloat16

Bound by arithmetic when an expert has many rows, by reading the weights once when it has few. `Zipf` is the same work
with experts as popular as 1, 1/2, 1/3, ... of the first; fewer threads show how it scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import device
import moe_ops
import peers
import roofline
from passes import exact_results, forward_pass, gradient_pass, require_gradients, roof_in_turn
from report import OURS, PREPACKED, Report, Variant, parse_args, relative_error
from shapes import Shape
from timing import sets_to_stay_cold

Gemm = Callable[[Tensor, Tensor], Tensor]  # of rows and weights


def choose_uniformly(s: Shape) -> Tensor:
    return torch.randn(s.tokens, s.experts).topk(s.top_k, dim=-1).indices


def choose_by_zipf(s: Shape) -> Tensor:
    popularity = 1 / torch.arange(1, s.experts + 1)
    return popularity.expand(s.tokens, -1).multinomial(s.top_k)


def on_threads(count: int, gemm: Gemm) -> Gemm:
    def run(rows: Tensor, w: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return gemm(rows, w)
        finally:
            torch.set_num_threads(before)

    return run


def bench_grouped_gemm(report: Report, s: Shape, dtype: torch.dtype) -> None:
    n, k, size = roofline.pre_width(s), s.hidden, dtype.itemsize

    def prepare(experts: Tensor) -> tuple[Tensor, int]:
        return peers.plan(experts, s.experts)[0], len(experts.unique())

    (offsets, active), (zipf_offsets, zipf_active) = prepare(choose_uniformly(s)), prepare(choose_by_zipf(s))

    def ours(rows: Tensor, w: Tensor) -> Tensor:
        return moe_ops.grouped_gemm(rows, w, offsets)

    def loop(rows: Tensor, w: Tensor) -> Tensor:
        return peers.loop_gemm(rows, w, offsets.tolist())

    gemms: dict[str, Gemm] = {OURS: ours, "loop over experts": loop}
    missing = {}
    if hasattr(F, "grouped_mm"):
        gemms["torch grouped_mm"] = lambda rows, w: F.grouped_mm(rows, w.transpose(1, 2), offs=offsets[1:])
    else:
        missing["torch grouped_mm"] = f"torch {torch.__version__} has none"

    count = sets_to_stay_cold(s.experts * n * k * size)
    sets = [
        (torch.randn(s.rows, k, dtype=dtype), torch.randn(s.experts, n, k, dtype=dtype) / k**0.5) for _ in range(count)
    ]
    grad = torch.randn(s.rows, n, dtype=dtype)

    def variant(name: str, gemm: Gemm, expected: Tensor, work: roofline.Work) -> Variant:
        return Variant(name, forward_pass(lambda i: gemm(*sets[i])), lambda got: relative_error(got[0], expected), work)

    exact = exact_results(loop, sets[0], grad, train=False)[0]
    work = roofline.grouped_gemm(s, size, n, k, active)
    table = [variant(name, gemm, exact, work) for name, gemm in gemms.items()]
    if not device.on_cuda():
        packed = [moe_ops.prepack(w) for _, w in sets]
        run = forward_pass(lambda i: moe_ops.grouped_gemm(sets[i][0], packed[i], offsets))
        table.append(Variant(PREPACKED, run, lambda got: relative_error(got[0], exact), work))
    table += [
        variant(f"{OURS}, threads: {threads}", on_threads(threads, ours), exact, work)
        for threads in (1, 2, 4, 8, 16, 32, 64)
        if threads < torch.get_num_threads() and not device.on_cuda()
    ]
    zipf_exact = peers.loop_gemm(sets[0][0].double(), sets[0][1], zipf_offsets.tolist())
    zipf_work = roofline.grouped_gemm(s, size, n, k, zipf_active)
    table.append(
        variant(f"{OURS}, Zipf", lambda rows, w: moe_ops.grouped_gemm(rows, w, zipf_offsets), zipf_exact, zipf_work)
    )
    table += roof_in_turn(report, [work], dtype, count)
    report.table("grouped_gemm forward", s, dtype, table, sets=count, missing=missing)

    require_gradients(sets, True)
    exact_gradients = exact_results(loop, sets[0], grad, train=True)[1:]
    works = roofline.grouped_gemm_input_grad(s, size, n, k, active), roofline.grouped_gemm_weight_grad(s, size, n, k)
    for operand, (what, work) in enumerate(zip(("input", "weight"), works, strict=True)):
        table = []
        for name, gemm in gemms.items():

            def forward(i: int, gemm: Gemm = gemm) -> Tensor:
                return gemm(*sets[i])

            def check(got: Tensor, expected: Tensor = exact_gradients[operand]) -> float:
                return relative_error(got, expected)

            table.append(Variant(name, gradient_pass(forward, sets, operand, grad), check, work))
        table += roof_in_turn(report, [work], dtype, count)
        report.table(f"grouped_gemm {what} gradient", s, dtype, table, sets=count, missing=missing)


def main() -> None:
    report = Report(parse_args("grouped_gemm"), tables_per_case=3)
    for shape, dtype in report.cases():
        bench_grouped_gemm(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
