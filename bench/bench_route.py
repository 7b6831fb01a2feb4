"""route: softmax over all experts, the top_k largest, renormalised; and DeepSeek-V3's way: sigmoid, bias, groups.

python bench/bench_route.py --shape qwen3-30b --dtype bfloat16
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

GROUPS, TOP_GROUPS = 8, 4  # DeepSeek-V3's


def distinct_logits(sets: int, s: Shape, dtype: torch.dtype) -> list[tuple[Tensor]]:
    """Each token's logits are the same values in another order, distinct in bfloat16 too: ties may be broken in any
    way, and weights and gradients could then not be compared.
    """
    values = torch.linspace(-8, 4, s.experts).exp2().to(dtype)
    return [(values[torch.rand(s.tokens, s.experts).argsort(dim=-1)],) for _ in range(sets)]


def check_choices(logits: Tensor, top_k: int) -> None:
    """Weights alone do not tell that the experts are right."""
    _, experts = moe_ops.route(logits, top_k, renormalize=True)
    chosen = logits.gather(1, experts.long())
    if not torch.equal(chosen, logits.topk(top_k, dim=-1).values):
        raise SystemExit("check failed: route did not choose the top_k largest logits; nothing was timed")


def tell_per_token(report: Report, s: Shape) -> None:
    """What a token costs, of the two tables just printed."""
    ours = [row for row, _ in report.results if row.variant == OURS][-2:]
    print("moe_ops: " + ", ".join(f"{row.median_s / s.tokens * 1e9:.0f} ns per token {row.name}" for row in ours))


def bench_route(report: Report, s: Shape, dtype: torch.dtype) -> None:
    sets = distinct_logits(sets_to_stay_cold(s.tokens * s.experts * dtype.itemsize), s, dtype)
    check_choices(sets[0][0], s.top_k)
    grad = torch.randn(s.tokens, s.top_k, dtype=peers.compute_dtype(dtype))
    work, backward_work = roofline.route(s, dtype.itemsize), roofline.route_backward(s, dtype.itemsize)
    softmax = {
        OURS: lambda logits: moe_ops.route(logits, s.top_k, renormalize=True)[0],
        "softmax, topk": lambda logits: peers.route(logits, s.top_k)[0],
    }

    def exact(logits: Tensor) -> Tensor:
        return peers.route(logits, s.top_k)[0]

    time_both_passes(
        report, "route", s, dtype, softmax, sets, grad, exact=exact, work=work, backward_work=backward_work
    )
    tell_per_token(report, s)
    if s.experts % GROUPS or s.top_k > s.experts // GROUPS * TOP_GROUPS or s.experts < 2 * GROUPS:
        return

    bias = torch.linspace(-0.1, 0.1, s.experts, dtype=peers.compute_dtype(dtype))
    grouped = {
        OURS: lambda logits: moe_ops.route(
            logits, s.top_k, score="sigmoid", selection_bias=bias, groups=(GROUPS, TOP_GROUPS), renormalize=True
        )[0],
        "sigmoid, groups, topk": lambda logits: peers.route_in_groups(logits, s.top_k, bias, GROUPS, TOP_GROUPS),
    }
    # Choices of float32, so that no near-tie of scores is decided otherwise in float64.
    time_both_passes(
        report,
        "route in groups",
        s,
        dtype,
        grouped,
        sets,
        grad,
        exact=lambda logits: peers.route_in_groups(logits, s.top_k, bias, GROUPS, TOP_GROUPS, sets[0][0].detach()),
        work=work,
        backward_work=backward_work,
    )
    tell_per_token(report, s)


def main() -> None:
    report = Report(parse_args("route"), tables_per_case=4)  # at most: not every shape has groups
    for shape, dtype in report.cases():
        bench_route(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
