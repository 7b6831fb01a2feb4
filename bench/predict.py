"""Predicts the time of each stage on a named card: from the bytes and FLOPs that it must move and do, the tiles that
they are cut into, the waves of blocks, and the launches. Nothing here was measured.

    python bench/predict.py --card h100-sxm --shape qwen3-30b
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

import roofline
from roofline import Work
from shapes import CUDA, Shape, parse

LAUNCH = 3e-6  # s from kernel to kernel in a stream; an assumption
FEW_ROWS = 64  # csrc/cuda/launch/grouped_gemm.h


@dataclass(frozen=True)
class Card:
    """Peaks of a data sheet, without sparsity, in FLOP/s and bytes/s."""

    title: str
    known_as: tuple[str, ...]  # parts of the name that the driver gives
    processors: int
    tensor_cores: float  # 16-bit
    mma_share: float  # of them that mma.sync reaches
    float32: float
    memory: float
    source: str


H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet"
A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet"
# On Hopper the peak is reached through wgmma alone; mma.sync comes to somewhat above 60 % of it (Luo et al.,
# "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499).
HOPPER_MMA = 0.62
CARDS = {
    "a100-sxm-80gb": Card("A100 SXM 80 GB", ("A100-SXM4-80GB",), 108, 312e12, 1.0, 19.5e12, 2.039e12, A100_SHEET),
    "a100-sxm-40gb": Card("A100 SXM 40 GB", ("A100-SXM4-40GB",), 108, 312e12, 1.0, 19.5e12, 1.555e12, A100_SHEET),
    "a100-pcie-80gb": Card("A100 PCIe 80 GB", ("A100 80GB PCIe",), 108, 312e12, 1.0, 19.5e12, 1.935e12, A100_SHEET),
    "h100-sxm": Card("H100 SXM", ("H100 80GB HBM3",), 132, 989.4e12, HOPPER_MMA, 66.9e12, 3.35e12, H100_SHEET),
    "h100-pcie": Card("H100 PCIe", ("H100 PCIe",), 114, 756e12, HOPPER_MMA, 51e12, 2.0e12, H100_SHEET),
    "h200-sxm": Card(
        "H200 SXM",
        ("NVIDIA H200",),
        132,
        989.4e12,
        HOPPER_MMA,
        66.9e12,
        4.8e12,
        "NVIDIA H200 Tensor Core GPU data sheet",
    ),
}


def card_of(device_name: str) -> Card | None:
    """The card that a driver calls so; None where its peaks are not known here."""
    return next((card for card in CARDS.values() if any(part in device_name for part in card.known_as)), None)


def memory_bound(card: Card, work: Work, launches: int = 1) -> float:
    return (work.read + work.written) / card.memory + launches * LAUNCH


def tile_turns(card: Card, tiles: int, blocks: int) -> int:
    """How many tiles the busiest processor multiplies, with `blocks` of them at a time: full waves, and the last."""
    waves, rest = divmod(tiles, card.processors * blocks)
    return waves * blocks + ceil(rest / card.processors)


def active_experts(s: Shape) -> int:
    """Experts that have rows where tokens choose uniformly: their expected number."""
    return max(1, round(s.experts * (1 - (1 - s.top_k / s.experts) ** s.tokens)))


def prefers_large_tiles(card: Card, s: Shape, n: int) -> bool:
    """As csrc/cuda/launch/gemm_config.h chooses between 128 and 64 rows."""

    def rows_in_turn(rows: int) -> int:
        row_tiles = ceil((2 * s.rows + min(s.experts, s.rows) * rows) / (2 * rows))
        return ceil(row_tiles * ceil(n / 128) / card.processors) * rows

    return 4 * rows_in_turn(128) < 5 * rows_in_turn(64)


def product(card: Card, s: Shape, size: int, n: int, k: int) -> float:
    """Rows [R, k] by weights [n, k] of each expert, rows shared out evenly: tiles as csrc/cuda/launch/gemm_config.h."""
    active = active_experts(s)
    work = roofline.grouped_gemm(s, size, n, k, active)
    if s.rows <= FEW_ROWS:
        return memory_bound(card, work)
    tile_rows, blocks = (128, 2) if size == 2 and prefers_large_tiles(card, s, n) else (64, 3 if size == 2 else 2)
    tiles = active * ceil(s.rows / active / tile_rows) * ceil(n / 128)
    return _of_tiles(card, work, size, tiles, 2.0 * tile_rows * 128 * ceil(k / 32) * 32, blocks)


def weight_gradient(card: Card, s: Shape, size: int, n: int, k: int) -> float:
    rows = ceil(s.rows / active_experts(s) / 32) * 32
    tiles = active_experts(s) * ceil(n / 128) * ceil(k / 128)
    work = roofline.grouped_gemm_weight_grad(s, size, n, k)
    return _of_tiles(card, work, size, tiles, 2.0 * 128 * 128 * rows, 2 if size == 2 else 1)


def _of_tiles(card: Card, work: Work, size: int, tiles: int, flops: float, blocks: int) -> float:
    peak = card.tensor_cores * card.mma_share if size == 2 else card.float32
    arithmetic = tile_turns(card, tiles, blocks) * flops / (peak / card.processors)
    return max(arithmetic, (work.read + work.written) / card.memory) + LAUNCH


def stages(card: Card, s: Shape, size: int) -> dict[str, float]:
    """Seconds by the names of the benches' tables, moe_ops's own kernels alone."""
    pre, h, i = roofline.pre_width(s), s.hidden, s.inner
    route = memory_bound(card, roofline.route(s, size))
    route_backward = memory_bound(card, roofline.route_backward(s, size))
    plan = memory_bound(card, roofline.plan(s), 1 if s.rows <= 4096 else 3)
    permute = memory_bound(card, roofline.permute(s, size))
    combine = memory_bound(card, roofline.combine(s, size))
    first, second = product(card, s, size, pre, h), product(card, s, size, h, i)
    first_input, second_input = product(card, s, size, h, pre), product(card, s, size, i, h)
    first_weight, second_weight = weight_gradient(card, s, size, pre, h), weight_gradient(card, s, size, h, i)

    logits = Work(2.0 * s.tokens * h * s.experts, (s.tokens + s.experts) * h * 4, s.tokens * s.experts * 4)
    router = max(logits.flops / card.float32, (logits.read + logits.written) / card.memory) + LAUNCH
    forward = router + memory_bound(card, roofline.route(s, 4)) + plan + first + second + combine
    backward = second_input + second_weight + first_input + first_weight
    backward += memory_bound(card, roofline.permute_backward(s, size))
    backward += 2 * router + memory_bound(card, roofline.route_backward(s, 4))
    return {
        "route forward": route,
        "route forward+backward": route + route_backward,
        "plan": plan,
        "permute forward": permute,
        "permute forward+backward": permute + memory_bound(card, roofline.permute_backward(s, size)),
        "combine forward": combine,
        "combine forward+backward": combine + memory_bound(card, roofline.combine_backward(s, size)),
        "grouped_gemm forward": first,
        "grouped_gemm input gradient": first_input,
        "grouped_gemm weight gradient": first_weight,
        "moe forward": forward,
        "moe forward+backward": forward + backward,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100-sxm")
    parser.add_argument("--shape", action="append", help="T,H,I,E,K or a name of the standing set; may be repeated")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    card = CARDS[args.card]
    share = f", {card.mma_share:.0%} of it through mma.sync" if card.mma_share < 1 else ""
    print(f"predicted, not measured, for {card.title}: {card.processors} processors, {card.memory / 1e12:.2f} TB/s,")
    print(f"{card.tensor_cores / 1e12:.0f} TFLOP/s of 16-bit products{share} ({card.source}).")
    print(f"{LAUNCH * 1e6:.0f} us a launch are assumed; what bounds route is instructions, which are not counted here.")
    for name in args.shape or CUDA["moe"]:
        shape = parse(name)
        print(f"\n{shape}  {args.dtype}")
        for stage, seconds in stages(card, shape, 4 if args.dtype == "float32" else 2).items():
            print(f"  {stage:30} predicted {seconds * 1e6:10.1f} us")


if __name__ == "__main__":
    main()
