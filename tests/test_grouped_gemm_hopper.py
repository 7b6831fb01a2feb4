"""grouped_gemm on Hopper: when it multiplies with wgmma, and when blocks fetch weights for one another."""

import itertools

import pytest
import torch

import moe_ops
from accuracy import assert_as_accurate, assert_bitwise_equal, place
from calls import gathered, product
from cases import LOW, integers, offsets_of, randn
from moe_ops import _C, reference


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    ("arch", "counts", "n", "k", "used"),
    [
        (90, (70, 0, 31), 136, 72, (True, True, True)),
        (90, (40, 0, 21), 136, 72, (False, False, True)),  # up to 64 rows the weights stream
        (90, (70, 0, 31), 136, 71, (False, False, False)),
        (80, (70, 0, 31), 136, 72, (False, False, False)),
    ],
)
def test_hopper_multiplies_with_wgmma(arch, counts, n, k, used, dtype, device, wgmmas, monkeypatch):
    """The product, the gradient of a and that of w: by kernels of sm_90a, or by those of every card, and right."""
    monkeypatch.setenv("MOE_OPS_SIMT_ARCH", str(arch))
    a, w = integers(sum(counts), k, dtype=dtype, limit=1), integers(len(counts), n, k, dtype=dtype, seed=1, limit=1)
    grad, offsets = integers(sum(counts), n, dtype=dtype, seed=2, limit=1), offsets_of(counts)
    grads, multiplied = [], []
    for wanted in (0, 1):
        leaves = [place(a, device), place(w, device)]
        leaves[wanted].requires_grad_()
        before = wgmmas()
        out = moe_ops.grouped_gemm(*leaves, place(offsets, device))
        between = wgmmas()
        grads += torch.autograd.grad(out, leaves[wanted], place(grad, device))
        multiplied += [between > before, wgmmas() > between]
    assert multiplied == [used[0], used[1], used[0], used[2]]
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    belongs = torch.nn.functional.one_hot(expert, len(counts)).double()
    a, w, grad = a.double(), w.double(), grad.double()
    assert torch.equal(out.detach().double(), torch.einsum("rk,rnk->rn", a, w[expert]).to(dtype).double())
    assert torch.equal(grads[0].double(), torch.einsum("rn,rnk->rk", grad, w[expert]).to(dtype).double())
    assert torch.equal(grads[1].double(), torch.einsum("re,rn,rk->enk", belongs, grad, a).to(dtype).double())


def shared_boxes(offsets, n, k, cols, boxes):
    """Boxes that went to both blocks of a cluster: each block's half of every step, where the tiles at 2 i and 2 i + 1
    of the walk multiply the same weights. cols: of a tile; boxes: of half a tile's columns."""
    walk = []  # (expert, group of rows, first column)
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        row_tiles = -(-(end - begin) // 128)
        for group in range(0, row_tiles, 16):
            for col in range(0, n, cols):
                walk += [(expert, group, col)] * min(16, row_tiles - group)
    pairs = sum(first == second for first, second in zip(walk[::2], walk[1::2], strict=False))
    return pairs * 2 * -(-k // 64) * boxes


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shared_tiles", [False, True], ids=["in turns", "shared"])
@pytest.mark.parametrize("k_major", [True, False])
@pytest.mark.parametrize(
    ("counts", "dropped", "n", "k"),
    [
        ((385, 0, 700, 1), 40, 200, 72),  # odd numbers of row tiles, an expert of one row, columns and K end in a tile
        ((256,), 40, 8, 64),  # fewer pairs than clusters
        ((129, 600), 40, 520, 8),  # more, and the last tile alone
        ((385,), 0, 8, 8),  # no tile behind the last
        ((300,), 700, 8, 8),  # clusters that only clear
        ((*[0] * 32, 8600), 0, 8, 8),  # more experts than lanes
    ],
)
def test_blocks_fetch_weights_for_one_another(
    counts, dropped, n, k, k_major, shared_tiles, dtype, device, multicasts, monkeypatch
):
    """Clusters on sm_90a: as many boxes go to two blocks as can, and the bits are those of blocks that run alone, as
    they do where rows are gathered. The last rows are no expert's."""
    monkeypatch.setenv("MOE_OPS_SIMT_ARCH", "90")
    ids = torch.cat([torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), torch.full((dropped,), -1)])
    plan = reference.plan(ids.unsqueeze(1), len(counts))
    rows, w = randn(len(ids), k, dtype=dtype), randn(len(counts), n, k, dtype=dtype, seed=1)
    if not k_major:
        w = w.mT.contiguous().mT
    chosen = _C.gemm_tiles(4, str(dtype).removeprefix("torch."), len(ids), len(counts), n, arch=90, k=k)
    cols = 256 if shared_tiles else 128
    assert chosen["cluster"] == 2 and (shared_tiles or chosen["cols"] == cols)
    moe_ops.set_batch_invariant(shared_tiles)
    try:
        before = multicasts()
        together = moe_ops.grouped_gemm(place(rows, device), place(w, device), place(plan.offsets, device))
        between = multicasts()
        alone = gathered(ids.unsqueeze(1), len(counts))(moe_ops, place(rows, device), place(w, device))
    finally:
        moe_ops.set_batch_invariant(False)
    assert between - before == shared_boxes(plan.offsets, n, k, cols, 1 if k_major else cols // 128) > 0
    assert multicasts() == between
    assert_bitwise_equal(together, alone)
    assert_as_accurate(
        together,
        reference.grouped_gemm(rows, w, plan.offsets),
        product(plan.offsets)(reference, rows.double(), w.double()),
    )
