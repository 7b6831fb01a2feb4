"""A Mixtral block of transformers, router and experts, on each of its experts implementations and on ours.

    python bench/bench_transformers.py --quick

Shapes of many tokens are prefill, those of few decode. Only the implementation differs: all variants are one block with
one set of weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import roofline
from bench_moe import exact
from passes import exact_results, forward_pass
from report import OURS, Report, Variant, parse_args, relative_error
from shapes import Shape
from timing import sets_to_stay_cold

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
MOST_GATHERED = 2**31  # bytes of weights that batched_mm copies, one matrix per slot


def build(s: Shape, dtype: torch.dtype) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": s.hidden, "intermediate_size": s.inner}
    config = MixtralConfig(num_local_experts=s.experts, num_experts_per_tok=s.top_k, hidden_act=s.activation, **sizes)
    block = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    block.experts.to(dtype)
    block.gate.float()
    return block


def bench_block(report: Report, s: Shape, dtype: torch.dtype) -> None:
    expert_bytes = roofline.weights_of_expert(s) * dtype.itemsize
    count = sets_to_stay_cold(s.experts * expert_bytes)
    sets: list[tuple[Any, Tensor]] = [
        (build(s, dtype), torch.randn(s.tokens, s.hidden, dtype=dtype)) for _ in range(count)
    ]
    choices = [block.gate(x.float())[-1] for block, x in sets]
    active = round(sum(len(choice.unique()) for choice in choices) / len(choices))
    block, x = sets[0]
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    expected = exact_results(lambda *t: exact(*t, s, choices[0]), (x, *weights), torch.empty(0), False)

    def layer(implementation: str) -> Callable[[int], Tensor]:
        def run(i: int) -> Tensor:
            block, x = sets[i]
            block.experts.config._experts_implementation = implementation
            _, route_weights, experts = block.gate(x.float())
            return block.experts(x, experts, route_weights.to(dtype))

        return run

    missing = {}
    variants = []
    for name in (OURS, *IMPLEMENTATIONS):
        if name == "batched_mm" and s.rows * expert_bytes > MOST_GATHERED:
            missing[name] = f"would copy {s.rows * expert_bytes / 2**30:.0f} GiB of weights"
            continue
        run = forward_pass(layer(name))
        work = roofline.moe_forward(s, dtype.itemsize, active)
        variants.append(Variant(name, run, lambda got: relative_error(got, expected), work))
    report.table("transformers block forward", s, dtype, variants, sets=count, missing=missing)


def main() -> None:
    try:
        from moe_ops.integrations.transformers import enable

        enable()
    except ImportError as error:
        sys.exit(str(error))
    report = Report(parse_args("transformers"), tables_per_case=1)
    for shape, dtype in report.cases():
        bench_block(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
