"""The products of sm_90a by the account of predict.py: tiles as csrc/cuda/launch/gemm_tiles_sm90.h and
weight_grad_tiles.h choose them, a block on each processor, which walks over them."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from roofline import Work

if TYPE_CHECKING:
    from predict import Card

DEPTH = 64  # of a step
FLOPS_OF_CYCLE = 4096  # of a processor's tensor cores
# As csrc/cuda/launch/gemm_tiles_sm90.h: cycles of a step by a tile's columns, as the tensor cores and shared memory
# bound it, and instructions that a warp issues for its 128 sums a thread. The gradient's are stored as products are.
STEP = {128: 640, 256: 1024}
EPILOGUE = {"store": 16 * 50, "activate": 8 * 258, "activate_backward": 16 * 377}
WIDE, TALL, SQUARE = (128, 256), (256, 128), (128, 128)
ALIGNED = 8  # values in 16 bytes: what the kernels take
MOST_EXPERTS = 1024  # of a weight gradient, csrc/cuda/kernels/gradient_walk.cuh


def _tile_cycles(in_turns: bool, k: int, epilogue: str, share: float = 1) -> float:
    """Of one tile, where the tensor cores reach a share of their peak."""
    products, stores = ceil(k / DEPTH) * STEP[128 if in_turns else 256] / share, EPILOGUE[epilogue]
    return max(products, (products + stores) / 2) if in_turns else products + 2 * stores


def takes_turns(processors: int, rows: int, experts: int, n: int, k: int, epilogue: str) -> bool:
    """Whether the ragged-M kernel's consumers take turns with tiles of [128, 128]: pick_hopper_tiles."""
    row_tiles = ceil((2 * rows + min(experts, rows) * 128) / 256)

    def cost(in_turns: bool) -> float:
        turns = ceil(row_tiles * ceil(n / (128 if in_turns else 256)) / processors)
        return turns * int(_tile_cycles(in_turns, k, epilogue)) + in_turns * EPILOGUE[epilogue]

    return cost(True) < cost(False)


def grad_tiles(processors: int, experts: int, n: int, k: int, gathers_a: bool) -> tuple[int, int]:
    """pick_weight_grad_tiles."""

    def cost(tile: tuple[int, int]) -> int:
        count = experts * ceil(n / tile[0]) * ceil(k / tile[1])
        return ceil(count / processors) * tile[0] * tile[1] * (5 if tile == SQUARE else 4)

    return min((TALL if gathers_a else WIDE, WIDE, TALL, SQUARE), key=cost)


def product(
    card: Card, rows: int, active: int, experts: int, work: Work, n: int, k: int, epilogue: str = "store"
) -> float:
    in_turns = takes_turns(card.processors, rows, experts, n, k, epilogue)
    count = active * ceil(rows / active / 128) * ceil(n / (128 if in_turns else 256))
    cycles = ceil(count / card.processors) * _tile_cycles(in_turns, k, epilogue, card.wgmma_share)
    return _seconds(card, work, cycles + in_turns * EPILOGUE[epilogue])


def fetches_for_one_another(rows: int, experts: int, gathers: bool) -> bool:
    """Whether blocks run in clusters of two that share weights: pick_hopper_cluster, on a card with room for them."""
    return not gathers and rows >= 256 * max(experts, 1)


def fetched(
    processors: int, rows: int, active: int, experts: int, n: int, k: int, epilogue: str = "store", *, gathers: bool
) -> int:
    """Bytes of a product that come to shared memory through L2, rows shared out evenly: both operands of each step of
    a tile, the weights once for the two tiles of a cluster where they are the same."""
    cols = 128 if takes_turns(processors, rows, experts, n, k, epilogue) else 256
    row_tiles = ceil(rows / active / 128)
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
    square = tile == SQUARE  # 64 sums a thread
    step = STEP[128 if square else 256] / card.wgmma_share
    of_tile = ceil(rows / active / DEPTH) * step + EPILOGUE["store"] * (1 if square else 2)
    return _seconds(card, work, ceil(count / card.processors) * of_tile)


def _seconds(card: Card, work: Work, cycles: float) -> float:
    clock = card.tensor_cores / card.processors / FLOPS_OF_CYCLE
    return max(cycles / clock, (work.read + work.written) / card.memory)
