"""Predicts the time of each stage on a named card: from the bytes and FLOPs that it must move and do, the tiles that
they are cut into, the waves of blocks, and the launches. Nothing here was measured.

    python bench/predict.py --card h100-sxm --shape qwen3-30b
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

import predict_sm90
import roofline
from published import SONICMOE
from roofline import Work
from shapes import CUDA, Shape, parse

LAUNCH = 3e-6  # s from kernel to kernel in a stream: an assumption, printed as one; what early starts hide is not known
FEW_ROWS = 64  # csrc/cuda/launch/grouped_gemm.h


@dataclass(frozen=True)
class Card:
    """Peaks of a data sheet, without sparsity, in FLOP/s and bytes/s."""

    title: str
    known_as: tuple[str, ...]  # parts of the name that the driver gives
    processors: int
    tensor_cores: float  # 16-bit
    mma_share: float  # of them that mma.sync is taken to reach
    float32: float
    memory: float
    source: str
    wgmma_share: float = 0.0  # of the tensor cores that wgmma is taken to reach; 0 where there is none


H100_SHEET = "NVIDIA H100 Tensor Core GPU data sheet"
A100_SHEET = "NVIDIA A100 Tensor Core GPU data sheet"
# On Hopper the peak is for wgmma; mma.sync is assumed to come to this share, near what Luo et al. saw
# ("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499).
HOPPER_MMA = 0.62
# The best dense bf16 kernel with public sources: 808 TFLOP/s at N = 8192 on an H100 SXM (pranjalssh/fast.cu, README;
# cuBLAS 795 there). Power, not issue slots, keeps it there.
HOPPER_WGMMA = 808 / 989.4
CARDS = {
    "a100-sxm-80gb": Card("A100 SXM 80 GB", ("A100-SXM4-80GB",), 108, 312e12, 1.0, 19.5e12, 2.039e12, A100_SHEET),
    "a100-sxm-40gb": Card("A100 SXM 40 GB", ("A100-SXM4-40GB",), 108, 312e12, 1.0, 19.5e12, 1.555e12, A100_SHEET),
    "a100-pcie-80gb": Card("A100 PCIe 80 GB", ("A100 80GB PCIe",), 108, 312e12, 1.0, 19.5e12, 1.935e12, A100_SHEET),
    "h100-sxm": Card(
        "H100 SXM", ("H100 80GB HBM3",), 132, 989.4e12, HOPPER_MMA, 66.9e12, 3.35e12, H100_SHEET, HOPPER_WGMMA
    ),
    "h100-pcie": Card("H100 PCIe", ("H100 PCIe",), 114, 756e12, HOPPER_MMA, 51e12, 2.0e12, H100_SHEET, HOPPER_WGMMA),
    "h200-sxm": Card(
        "H200 SXM",
        ("NVIDIA H200",),
        132,
        989.4e12,
        HOPPER_MMA,
        66.9e12,
        4.8e12,
        "NVIDIA H200 Tensor Core GPU data sheet",
        HOPPER_WGMMA,
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


def product(card: Card, s: Shape, size: int, n: int, k: int, epilogue: str = "store") -> float:
    """Rows [R, k] by weights [n, k] of each expert, rows shared out evenly: tiles as csrc/cuda/launch/gemm_config.h."""
    active = active_experts(s)
    work = roofline.grouped_gemm(s, size, n, k, active)
    if s.rows <= FEW_ROWS:
        return memory_bound(card, work)
    if serves_hopper(card, size, n, k):
        return predict_sm90.product(card, s.rows, active, s.experts, work, n, k, epilogue) + LAUNCH
    tile_rows, blocks = (128, 2) if size == 2 and prefers_large_tiles(card, s, n) else (64, 3 if size == 2 else 2)
    tiles = active * ceil(s.rows / active / tile_rows) * ceil(n / 128)
    return _of_tiles(card, work, size, tiles, 2.0 * tile_rows * 128 * ceil(k / 32) * 32, blocks)


def weight_gradient(card: Card, s: Shape, size: int, n: int, k: int, gathers_a: bool) -> float:
    """[n, k] of each expert; gathers_a: the rows of the operand with k columns are gathered, not the other's."""
    active = active_experts(s)
    work = roofline.grouped_gemm_weight_grad(s, size, n, k)
    if serves_hopper(card, size, n, k) and s.experts <= predict_sm90.MOST_EXPERTS:
        return predict_sm90.weight_gradient(card, s.rows, active, s.experts, work, n, k, gathers_a) + LAUNCH
    tiles = active * ceil(n / 128) * ceil(k / 128)
    rows = ceil(s.rows / active / 32) * 32
    return _of_tiles(card, work, size, tiles, 2.0 * 128 * 128 * rows, 2 if size == 2 else 1)


def serves_hopper(card: Card, size: int, n: int, k: int) -> bool:
    """Whether the kernels of sm_90a take operands that lie densely."""
    return card.wgmma_share > 0 and size == 2 and n % predict_sm90.ALIGNED == 0 and k % predict_sm90.ALIGNED == 0


def _of_tiles(card: Card, work: Work, size: int, tiles: int, flops: float, blocks: int) -> float:
    peak = card.tensor_cores * card.mma_share if size == 2 else card.float32
    arithmetic = tile_turns(card, tiles, blocks) * flops / (peak / card.processors)
    return max(arithmetic, (work.read + work.written) / card.memory) + LAUNCH


def experts(card: Card, s: Shape, size: int) -> tuple[float, float]:
    """Forward and backward of moe_mlp, from routed tokens to their sum: plan, products, combine."""
    pre, h, i = roofline.pre_width(s), s.hidden, s.inner
    plan = memory_bound(card, roofline.plan(s), 1 if s.rows <= 4096 else 3)
    forward = plan + product(card, s, size, pre, h, "activate") + product(card, s, size, h, i)
    forward += memory_bound(card, roofline.combine(s, size))
    backward = product(card, s, size, i, h, "activate_backward") + weight_gradient(card, s, size, h, i, gathers_a=False)
    backward += product(card, s, size, h, pre) + weight_gradient(card, s, size, pre, h, gathers_a=True)
    backward += memory_bound(card, roofline.permute_backward(s, size))
    return forward, backward


def stages(card: Card, s: Shape, size: int) -> dict[str, float]:
    """Seconds by the names of the benches' tables, moe_ops's own kernels alone."""
    pre, h = roofline.pre_width(s), s.hidden
    route = memory_bound(card, roofline.route(s, size))
    route_backward = memory_bound(card, roofline.route_backward(s, size))
    permute = memory_bound(card, roofline.permute(s, size))
    combine = memory_bound(card, roofline.combine(s, size))

    logits = Work(2.0 * s.tokens * h * s.experts, (s.tokens + s.experts) * h * 4, s.tokens * s.experts * 4)
    router = max(logits.flops / card.float32, (logits.read + logits.written) / card.memory) + LAUNCH
    forward, backward = experts(card, s, size)
    forward += router + memory_bound(card, roofline.route(s, 4))
    backward += 2 * router + memory_bound(card, roofline.route_backward(s, 4))
    return {
        "route forward": route,
        "route forward+backward": route + route_backward,
        "plan": memory_bound(card, roofline.plan(s), 1 if s.rows <= 4096 else 3),
        "permute forward": permute,
        "permute forward+backward": permute + memory_bound(card, roofline.permute_backward(s, size)),
        "combine forward": combine,
        "combine forward+backward": combine + memory_bound(card, roofline.combine_backward(s, size)),
        "grouped_gemm forward": product(card, s, size, pre, h),
        "grouped_gemm input gradient": product(card, s, size, h, pre),
        "grouped_gemm weight gradient": weight_gradient(card, s, size, pre, h, gathers_a=True),
        "moe forward": forward,
        "moe forward+backward": forward + backward,
    }


def through_l2(card: Card, s: Shape, size: int) -> dict[str, tuple[int, float]]:
    """moe_mlp's products of rows on Hopper: bytes that their tiles fetch through L2, bytes/s in the time predicted."""
    pre, h, i = roofline.pre_width(s), s.hidden, s.inner
    products = {
        "w_in forward": (pre, h, "activate", True),
        "w_out forward": (h, i, "store", False),
        "w_out input gradient": (i, h, "activate_backward", True),
        "w_in input gradient": (h, pre, "store", False),
    }
    found = {}
    for name, (n, k, epilogue, gathers) in products.items():
        if s.rows > FEW_ROWS and serves_hopper(card, size, n, k):
            active = active_experts(s)
            count = predict_sm90.fetched(card.processors, s.rows, active, s.experts, n, k, epilogue, gathers=gathers)
            found[name] = count, count / (product(card, s, size, n, k, epilogue) - LAUNCH)
    return found


def beside_published(card: Card) -> list[str]:
    """SonicMoE's shapes: TFLOP/s and milliseconds predicted here, TFLOP/s published for an H100 SXM."""
    lines = ["| T, H, I, E, K | predicted forward | published | predicted backward | published |", "| --- " * 5 + "|"]
    for s, published in SONICMOE.items():
        flops = 6.0 * s.tokens * s.inner * s.hidden * s.top_k
        cells = [f"{s.name}: {s.tokens}, {s.hidden}, {s.inner}, {s.experts}, {s.top_k}"]
        for seconds, work, theirs in zip(experts(card, s, 2), (flops, 2 * flops), published, strict=True):
            cells += [f"{work / seconds / 1e12:.0f} ({seconds * 1e3:.2f} ms)", str(theirs)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100-sxm")
    parser.add_argument("--shape", action="append", help="T,H,I,E,K or a name of the standing set; may be repeated")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--published", action="store_true", help="SonicMoE's 12 shapes beside its published figures")
    args = parser.parse_args(argv)
    card = CARDS[args.card]
    share = ""
    if card.wgmma_share:
        share = f", of which wgmma is assumed to reach {card.wgmma_share:.0%} and mma.sync {card.mma_share:.0%}"
    print(f"predicted, not measured, for {card.title}: {card.processors} processors, {card.memory / 1e12:.2f} TB/s,")
    print(f"{card.tensor_cores / 1e12:.0f} TFLOP/s of 16-bit products{share} ({card.source}).")
    print(f"{LAUNCH * 1e6:.0f} us a launch are assumed; what bounds route is instructions, which are not counted here.")
    if card.wgmma_share:
        print("Kernels start before the one ahead has ended; what that hides of a launch is not taken off.")
    if args.published:
        print("\nTFLOP/s of 6 T I H K and 12 T I H K; published: SonicMoE, read off its figures\n")
        print("\n".join(beside_published(card)))
        return
    for name in args.shape or CUDA["moe"]:
        shape = parse(name)
        print(f"\n{shape}  {args.dtype}")
        size = 4 if args.dtype == "float32" else 2
        for stage, seconds in stages(card, shape, size).items():
            print(f"  {stage:30} predicted {seconds * 1e6:10.1f} us")
        for name, (count, rate) in through_l2(card, shape, size).items():
            print(f"  {name:30} predicted {count / 1e9:10.2f} GB through L2, {rate / 1e12:.1f} TB/s")


if __name__ == "__main__":
    main()
