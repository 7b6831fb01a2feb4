"""The weight gradient as nvcc compiles it, without torch: rows that are gathered or scaled, experts of any length."""

import pytest
import torch
from params import STRUCTS

from accuracy import assert_bitwise_equal, hold
from cases import randn, seeded

COUNTS = [70, 0, 64, 1, 131]  # rows of experts
ROWS = sum(COUNTS) + 9  # the last belong to none
DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# On an H100 square tiles; and wide ones, or tall ones where a alone is gathered.
every_shape = pytest.mark.parametrize(("n", "k"), [(136, 120), (1152, 384)])


class Operand:
    """Rows [ROWS, cols], as they lie or as row_slot finds them, times a scale of the slot where there is one."""

    def __init__(self, cols, dtype, seed, *, gathered=False, scaled=False):
        self.width = 3 if gathered else 1
        self.rows = randn(ROWS // 2 if gathered else ROWS, cols, dtype=dtype, seed=seed)
        slots = len(self.rows) * self.width
        self.row_slot = torch.randint(slots, (ROWS,), generator=seeded(seed), dtype=torch.int32) if gathered else None
        self.scale = randn(slots, seed=seed + 1) if scaled else None
        if not gathered:
            self.rows[sum(COUNTS) :] = torch.nan  # nobody reads them: 0 * NaN would show

    def found(self):
        slot = torch.arange(ROWS) if self.row_slot is None else self.row_slot.long()
        rows = self.rows[slot // self.width]
        return rows if self.scale is None else (rows * self.scale[slot, None]).to(rows.dtype)

    def params(self, card):
        gather = {} if self.row_slot is None else {"row_slot": card.put(self.row_slot), "width": self.width}
        return STRUCTS["GatheredRows"](
            rows=card.matrix(self.rows), num_rows=len(self.rows), scale=card.vector(self.scale), **gather
        )


def offsets():
    return torch.tensor([0, *COUNTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def product(grad, a, dtype):
    """[E, N, K] in this precision."""
    parts = zip(grad.found().to(dtype).split([*COUNTS, 9]), a.found().to(dtype).split([*COUNTS, 9]), strict=True)
    return torch.stack([g.T @ x for g, x in list(parts)[:-1]])


def weight_grad(card, grad, a, out_dtype, accumulate=None):
    n, k = grad.rows.shape[1], a.rows.shape[1]
    out = card.new(len(COUNTS), n, k, dtype=out_dtype, values=accumulate)
    card.run(
        "grouped_gemm_weight_grad", "WeightGradParams", grad=grad.params(card), a=a.params(card),
        offsets=card.put(offsets()), num_experts=len(COUNTS), num_rows=ROWS, n=n, k=k, out=card.address(out),
        out_dtype=card.dtype(out_dtype), accumulate=accumulate is not None,
    )  # fmt: skip
    card.fetch()
    return out


@every_shape
@every_dtype
@pytest.mark.parametrize("gathered", ["neither", "grad", "a", "both"])
def test_gathered_sides(gathered, dtype, n, k, card):
    grad = Operand(n, dtype, 1, gathered=gathered in ("grad", "both"))
    a = Operand(k, dtype, 5, gathered=gathered in ("a", "both"))
    oracle, eager = product(grad, a, torch.float64), product(grad, a, dtype)
    ours = weight_grad(card, grad, a, dtype)
    hold({"grad w": ours}, {"grad w": eager}, {"grad w": oracle})
    assert_bitwise_equal(weight_grad(card, grad, a, dtype), ours)


@every_shape
@pytest.mark.parametrize(("of_grad", "of_a"), [(True, False), (False, True), (True, True)])
def test_scaled_sides(of_grad, of_a, n, k, card):
    grad = Operand(n, torch.bfloat16, 1, scaled=of_grad)
    a = Operand(k, torch.bfloat16, 5, gathered=True, scaled=of_a)
    oracle, eager = product(grad, a, torch.float64), product(grad, a, torch.bfloat16)
    ours = weight_grad(card, grad, a, torch.bfloat16)
    hold({"grad w": ours}, {"grad w": eager}, {"grad w": oracle})


@every_shape
def test_sums_are_added_to_float32(n, k, card):
    """An expert without rows leaves what is there, bit by bit; the others add what they would have stored."""
    grad, a = Operand(n, torch.bfloat16, 1), Operand(k, torch.bfloat16, 5, gathered=True)
    there = randn(len(COUNTS), n, k, seed=9)
    alone = weight_grad(card, grad, a, torch.float32)
    added = weight_grad(card, grad, a, torch.float32, accumulate=there)
    assert_bitwise_equal(added, there + alone)
    assert_bitwise_equal(added[1], there[1])
    assert not alone[1].any()
