"""The products of sm_90a by the account of predict.py: tiles as csrc/cuda/launch/gemm_tiles_sm90.h and
weight_grad_tiles.h choose them, a block on each processor, which walks over them."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from roofline import Work

if TYPE_CHECKING:
    from predict import Card

DEPTH = 64  # of a step
# Assumptions, the kernels' own: a [128, 128] tile, which fetches four thirds of the bytes for a product, takes a
# quarter longer; where consumers share a tile nothing is multiplied while it is stored.
NARROW = 1.25
WIDE, TALL, SQUARE = (128, 256), (256, 128), (128, 128)
ALIGNED = 8  # values in 16 bytes: what the kernels take
MOST_EXPERTS = 1024  # of a weight gradient, csrc/cuda/kernels/gradient_walk.cuh


def takes_turns(processors: int, rows: int, experts: int, n: int, k: int) -> bool:
    """Whether the ragged-M kernel's consumers take turns with tiles of [128, 128]: pick_hopper_tiles."""
    row_tiles = ceil((2 * rows + min(experts, rows) * 128) / 256)
    steps = ceil(k / DEPTH)
    shared = 4 * ceil(row_tiles * ceil(n / 256) / processors) * (2 * steps + 8)
    return 5 * ceil(row_tiles * ceil(n / 128) / processors) * steps + 16 < shared


def grad_tiles(processors: int, experts: int, n: int, k: int, gathers_a: bool) -> tuple[int, int]:
    """pick_weight_grad_tiles."""

    def cost(tile: tuple[int, int]) -> int:
        count = experts * ceil(n / tile[0]) * ceil(k / tile[1])
        return ceil(count / processors) * tile[0] * tile[1] * (5 if tile == SQUARE else 4)

    return min((TALL if gathers_a else WIDE, WIDE, TALL, SQUARE), key=cost)


def product(card: Card, rows: int, active: int, experts: int, work: Work, n: int, k: int) -> float:
    turns = takes_turns(card.processors, rows, experts, n, k)
    cols = 128 if turns else 256
    count = active * ceil(rows / active / 128) * ceil(n / cols)
    flops = ceil(count / card.processors) * 2.0 * 128 * cols * ceil(k / DEPTH) * DEPTH
    return _seconds(card, work, flops, narrow=turns, hidden=turns)


def fetches_for_one_another(rows: int, experts: int, gathers: bool) -> bool:
    """Whether blocks run in clusters of two that share weights: pick_hopper_cluster, on a card with room for them."""
    return not gathers and rows >= 256 * max(experts, 1)


def fetched(processors: int, rows: int, active: int, experts: int, n: int, k: int, *, gathers: bool) -> int:
    """Bytes of a product that come to shared memory through L2, rows shared out evenly: both operands of each step of
    a tile, the weights once for the two tiles of a cluster where they are the same."""
    row_tiles, cols = ceil(rows / active / 128), 128 if takes_turns(processors, rows, experts, n, k) else 256
    col_tiles, steps = ceil(n / cols), ceil(k / DEPTH)
    pairs = walked = 0
    if fetches_for_one_another(rows, experts, gathers):
        # Up to 16 row tiles of an expert pass a column of tiles before the next; two follow one another in a cluster.
        groups = [min(16, row_tiles - first) for first in range(0, row_tiles, 16)]
        for together in (size for _ in range(active) for size in groups for _ in range(col_tiles)):
            pairs += (together - walked % 2) // 2
            walked += together
    return 2 * DEPTH * steps * (active * row_tiles * col_tiles * (128 + cols) - pairs * cols)


def weight_gradient(
    card: Card, rows: int, active: int, experts: int, work: Work, n: int, k: int, gathers_a: bool
) -> float:
    tile = grad_tiles(card.processors, experts, n, k, gathers_a)
    count = active * ceil(n / tile[0]) * ceil(k / tile[1])  # those of experts without rows cost their stores alone
    flops = ceil(count / card.processors) * 2.0 * tile[0] * tile[1] * ceil(rows / active / DEPTH) * DEPTH
    return _seconds(card, work, flops, narrow=tile == SQUARE, hidden=False)


def _seconds(card: Card, work: Work, flops: float, *, narrow: bool, hidden: bool) -> float:
    arithmetic = flops / (card.tensor_cores * card.wgmma_share / card.processors) * (NARROW if narrow else 1)
    stores = 0 if hidden else work.written / card.memory
    return max(arithmetic + stores, (work.read + work.written) / card.memory)
