"""The whole layer, from tokens to tokens: router, experts, combine; forward, and forward with all gradients.

    python bench/bench_moe.py --quick

Each variant is first checked against the loop over experts in float64. `dense` is no Mixture of Experts: a plain
feed-forward layer that does the same FLOPs per token, the time that a perfect MoE layer would come close to.
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
from moe_ops import PackedWeight
from passes import Results, exact_results, forward_pass, require_gradients, roof_in_turn, training_pass
from report import OURS, PREPACKED, Report, Variant, parse_args, relative_error
from shapes import Shape
from timing import sets_to_stay_cold

Layer = Callable[..., Tensor]  # of the operands x, router, w_in, w_out; for dense: x, w_in, w_out

# Beyond this, a parameter [E, ...] indexed once per expert makes a backward of minutes: each gradient is E times as
# big as it need be.
MOST_EXPERTS_INDEXED = 32


def operands(s: Shape, dtype: torch.dtype) -> Results:
    return (
        torch.randn(s.tokens, s.hidden, dtype=dtype),
        torch.randn(s.experts, s.hidden, dtype=peers.compute_dtype(dtype)) / s.hidden**0.5,
        torch.randn(s.experts, roofline.pre_width(s), s.hidden, dtype=dtype) / s.hidden**0.5,
        torch.randn(s.experts, s.hidden, s.inner, dtype=dtype) / s.inner**0.5,
    )


def dense_operands(s: Shape, dtype: torch.dtype) -> Results:
    inner = s.top_k * s.inner
    return (
        torch.randn(s.tokens, s.hidden, dtype=dtype),
        torch.randn(s.top_k * roofline.pre_width(s), s.hidden, dtype=dtype) / s.hidden**0.5,
        torch.randn(s.hidden, inner, dtype=dtype) / inner**0.5,
    )


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    return F.linear(x.to(router.dtype), router)


def ours(x: Tensor, router: Tensor, w_in: Tensor | PackedWeight, w_out: Tensor | PackedWeight, s: Shape) -> Tensor:
    weights, experts = moe_ops.route(router_logits(x, router), s.top_k, renormalize=True)
    return moe_ops.moe_mlp(x, weights, experts, w_in, w_out, activation=s.activation, gated=s.gated)


def peer(apply_experts: Layer, x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, s: Shape) -> Tensor:
    weights, experts = peers.route(router_logits(x, router), s.top_k)
    return apply_experts(x, weights, experts, w_in, w_out, s)


def exact(x: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, s: Shape, experts: Tensor) -> Tensor:
    """The loop in float64 on given choices, which a near-tie could otherwise make differ from float32's."""
    weights = torch.softmax(router_logits(x, router), dim=-1).gather(1, experts)
    return peers.loop_experts(x, weights / weights.sum(dim=-1, keepdim=True), experts, w_in, w_out, s)


def prepacked(sets: list[Results], s: Shape) -> Callable[[int], Tensor]:
    """Ours on packed weights, which live as long as the function returned."""
    packed = [(moe_ops.prepack(w_in), moe_ops.prepack(w_out)) for _, _, w_in, w_out in sets]
    return lambda i: ours(*sets[i][:2], *packed[i], s)


def add_rivals(
    layers: dict[str, Callable[[int], Tensor]], missing: dict[str, str], sets: list[Results], s: Shape
) -> None:
    """Libraries of others, as far as they are installed."""
    for name, make in peers.RIVALS.items():
        try:
            experts = make(s)
        except Exception as reason:  # whatever another library's import may raise
            missing[name] = f"{type(reason).__name__}: {reason}".splitlines()[0][:90]
        else:
            layers[name] = lambda i, experts=experts: peer(experts, *sets[i], s)


def bench_layer(report: Report, s: Shape, dtype: torch.dtype) -> None:
    bytes_per_set = s.experts * roofline.weights_of_expert(s) * dtype.itemsize
    sets = [operands(s, dtype) for _ in range(sets_to_stay_cold(bytes_per_set))]
    dense_sets = [dense_operands(s, dtype) for _ in sets]
    grad_y = torch.randn(s.tokens, s.hidden, dtype=dtype)
    choices = [peers.route(router_logits(x, router), s.top_k)[1] for x, router, _, _ in sets]
    active = round(sum(len(choice.unique()) for choice in choices) / len(choices))  # experts that have rows

    layers: dict[str, Callable[[int], Tensor]] = {
        OURS: lambda i: ours(*sets[i], s),
        "loop over experts": lambda i: peer(peers.loop_experts, *sets[i], s),
    }
    missing = {}
    if hasattr(F, "grouped_mm"):
        layers["torch grouped_mm"] = lambda i: peer(peers.grouped_mm_experts, *sets[i], s)
    else:
        missing["torch grouped_mm"] = f"torch {torch.__version__} has none"
    try:
        blocks = [peers.transformers_experts(s, w_in, w_out) for _, _, w_in, w_out in sets]
        layers["transformers eager"] = lambda i: peer(blocks[i], *sets[i], s)
    except ImportError as reason:
        missing["transformers eager"] = str(reason)
    if device.on_cuda():
        add_rivals(layers, missing, sets, s)
    else:
        layers[PREPACKED] = prepacked(sets, s)

    y_and_gradients = exact_results(lambda *t: exact(*t, s, choices[0]), sets[0], grad_y, True)
    dense_y_and_gradients = exact_results(lambda *t: peers.dense(*t, s), dense_sets[0], grad_y, True)

    def table(train: bool) -> None:
        require_gradients([*sets, *dense_sets], train)
        results = None if train else 1
        expected, expected_dense = y_and_gradients[:results], dense_y_and_gradients[:results]
        work = (roofline.moe_training if train else roofline.moe_forward)(s, dtype.itemsize, active)
        variants = []
        for name, layer in layers.items():
            if train and name == "transformers eager" and s.experts > MOST_EXPERTS_INDEXED:
                missing[name] = f"its backward takes minutes with more than {MOST_EXPERTS_INDEXED} experts"
                continue
            run = training_pass(layer, sets, grad_y) if train else forward_pass(layer)
            variants.append(Variant(name, run, lambda got: relative_error(got, expected), work))

        def dense(i: int) -> Tensor:
            return peers.dense(*dense_sets[i], s)

        run = training_pass(dense, dense_sets, grad_y) if train else forward_pass(dense)
        dense_work = roofline.dense(s, dtype.itemsize, train)
        variants.append(Variant("dense, same FLOPs", run, lambda got: relative_error(got, expected_dense), dense_work))
        variants += roof_in_turn(report, [work], dtype, len(sets))
        name = "moe forward+backward" if train else "moe forward"
        report.table(name, s, dtype, variants, sets=len(sets), missing=missing)

    table(train=False)
    for name in (PREPACKED, *peers.RIVALS):  # have no gradient; their copies of the weights go
        layers.pop(name, None)
    table(train=True)


def main() -> None:
    report = Report(parse_args("moe"))
    for shape, dtype in report.cases():
        bench_layer(report, shape, dtype)
    report.finish()


if __name__ == "__main__":
    main()
