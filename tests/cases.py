"""The named edges, as data: how tokens choose experts, what logits hold, how tensors lie in memory."""

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = float("nan"), float("inf")
DEVICE = os.environ.get("MOE_OPS_DEVICE", "cpu")  # under test: conftest.py sets it
WIDEST = torch.float64 if DEVICE == "cpu" else torch.float32  # the others have no float64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, *([WIDEST] if DEVICE == "cpu" else [])]
LOW = [torch.bfloat16, torch.float16]

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU's kernels")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=seeded(seed), dtype=torch.float64) * scale).to(dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, limit: int = 2) -> Tensor:
    """Small whole numbers: sums of their products are exact in every dtype, whatever the order."""
    return torch.randint(-limit, limit + 1, shape, generator=seeded(seed)).to(dtype)


def powers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Route weights that multiply without rounding."""
    return torch.tensor([0.25, 0.5, 1.0, 2.0])[torch.randint(0, 4, shape, generator=seeded(seed))].to(dtype)


# ---- how tokens choose experts --------------------------------------------------------------------------------------


def offsets_of(counts: Iterable[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def distinct(tokens: int, experts: int, top_k: int) -> Tensor:
    return torch.rand(tokens, experts, generator=seeded()).argsort(1)[:, :top_k]


def even_only(tokens: int, experts: int, top_k: int) -> Tensor:
    return distinct(tokens, experts // 2, top_k) * 2


def crowded(tokens: int, experts: int, top_k: int) -> Tensor:
    """Expert e gets about e times as many slots as expert 1, so row counts fall beside every tile size."""
    share = torch.arange(experts).double()
    return torch.multinomial(share.expand(max(tokens, 1), -1), top_k, generator=seeded())[:tokens]


def duplicated(tokens: int, experts: int, top_k: int) -> Tensor:
    ids = distinct(tokens, experts, top_k)
    ids[::2] = ids[::2, :1]
    return ids


def some_dropped(tokens: int, experts: int, top_k: int) -> Tensor:
    ids = distinct(tokens, experts, top_k)
    ids[torch.rand(tokens, top_k, generator=seeded(1)) < 0.4] = -1
    return ids


def out_of_range(tokens: int, experts: int, top_k: int) -> Tensor:
    wrong = torch.tensor([-1, -2, experts, experts + 1, 1 << 20, 2**31 - 1, -(2**31)])
    ids = distinct(tokens, experts, top_k).flatten()
    ids[1::3] = wrong[torch.arange(len(ids[1::3])) % len(wrong)]
    return ids.view(tokens, top_k)


@dataclass(frozen=True)
class Case:
    """A choice of experts with the sizes around it."""

    name: str
    tokens: int = 9
    experts: int = 6
    top_k: int = 2
    hidden: int = 16
    inner: int = 8
    choose: Callable[[int, int, int], Tensor] = distinct

    def ids(self, dtype: torch.dtype = torch.int32) -> Tensor:
        return self.choose(self.tokens, self.experts, self.top_k).to(dtype)  # [T, K]


CASES = [
    Case("plain"),
    Case("no_tokens", tokens=0),
    Case("one_token", tokens=1),
    Case("one_token_one_choice", tokens=1, top_k=1),
    Case("empty_experts", experts=16, choose=even_only),
    Case("all_to_one_expert", tokens=70, top_k=1, choose=lambda t, e, k: torch.full((t, k), 3)),
    Case("top_k_is_experts", top_k=6),
    Case("one_expert", experts=1, top_k=1),
    Case("thousand_experts", tokens=13, experts=1000, top_k=8, hidden=5, inner=3),
    Case("odd_sizes", tokens=11, hidden=7, inner=5),
    Case("unit_sizes", hidden=1, inner=1),
    Case("crowded", tokens=60, experts=9, top_k=3, hidden=33, inner=17, choose=crowded),
    Case("duplicated_in_a_row", top_k=4, choose=duplicated),
    Case("some_dropped", top_k=3, choose=some_dropped),
    Case("all_dropped", choose=lambda t, e, k: torch.full((t, k), -1)),
    Case("out_of_range", tokens=12, top_k=3, choose=out_of_range),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
stored_weights = pytest.mark.parametrize(
    "dtype, stored", [*((d, d) for d in DTYPES), *((d, torch.float32) for d in LOW)]
)


# ---- what logits hold -----------------------------------------------------------------------------------------------

# Rows of one width, to be stacked into logits [T, 8].
LOGITS: dict[str, list[float]] = {
    "all_equal": [1.5] * 8,
    "pairs_equal": [1.0, 2.0, 1.0, 2.0, 0.0, 2.0, 1.0, 0.0],
    "signed_zeros": [-0.0, 0.0, -0.0, 0.0, -1.0, -0.0, 0.0, -0.0],
    "zero_after_negative_zero": [-1.0, -0.0, -1.0, 0.0, -1.0, -1.0, -1.0, -1.0],
    "one_nan": [0.0, 1.0, NAN, 3.0, 2.0, 5.0, -1.0, 4.0],
    "nan_and_inf": [INF, NAN, -INF, NAN, INF, 0.0, 1.0, -NAN],
    "all_nan": [NAN] * 8,
    "negative_nan_last": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -NAN],
    "one_inf": [0.0, 1.0, 2.0, INF, 3.0, 4.0, 5.0, 6.0],
    "all_inf": [INF] * 8,
    "all_minus_inf": [-INF] * 8,
    "all_but_one_minus_inf": [-INF, -INF, -INF, -INF, -INF, 2.0, -INF, -INF],
    "denormals": [0.0, 1e-45, -1e-45, 3e-45, 1e-40, -1e-40, 2e-40, -0.0],
    "last_bit": [1.0, 1.0 + 2**-23, 1.0, 1.0 + 2**-22, 1.0 - 2**-24, 1.0, 1.0 + 2**-23, 1.0],
    "last_bit_of_large": [50.0, 50.0 + 2**-18, 50.0 + 2**-17, 50.0, -50.0, -50.0 + 2**-18, 49.0, 50.0],
    "huge": [3e38, -3e38, 3.2e38, 1.0, -1.0, 3.3e38, 0.0, 3e38],
    "descending": [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
    "ascending": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}


# ---- how tensors lie in memory --------------------------------------------------------------------------------------


def unaligned(t: Tensor) -> Tensor:
    """The same values, one element behind an aligned address."""
    out = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape)
    return out.copy_(t)


def transposed(t: Tensor) -> Tensor:
    """Unit stride along the dimension before the last."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def poisoned(t: Tensor, *shape: int) -> Tensor:
    """A buffer of t's dtype full of what spoils a result that reads it: NaN, or the largest integer."""
    fill = NAN if t.is_floating_point() else torch.iinfo(t.dtype).max
    return torch.full(shape, fill, dtype=t.dtype, device=t.device)


def strided(t: Tensor) -> Tensor:
    """Every second element of a wider, poisoned buffer."""
    out = poisoned(t, *t.shape[:-1], 2 * t.shape[-1] + 1)[..., 1::2]
    return out.copy_(t)


def padded_rows(t: Tensor) -> Tensor:
    """Rows of unit stride with a poisoned gap of 3 elements between them."""
    out = poisoned(t, *t.shape[:-1], t.shape[-1] + 3)[..., :-3]
    return out.copy_(t)


def every_second(t: Tensor) -> Tensor:
    """The first dimension strided: every second entry of a poisoned buffer."""
    out = poisoned(t, 2 * t.shape[0], *t.shape[1:])[::2]
    return out.copy_(t)


LAYOUTS = [unaligned, transposed, strided, padded_rows, every_second]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def same_rows(t: Tensor) -> Tensor:
    """The first row expanded over all: stride 0."""
    return t[:1].expand_as(t)


layouts = st.sampled_from([lambda t: t, *LAYOUTS])
input_layouts = layouts | st.just(same_rows)  # that change the values, too


def constant(t: Tensor) -> Tensor:
    """The first element expanded over all, as the gradient of sum() is: every stride 0."""
    return t.flatten()[:1].view((1,) * t.dim()).expand_as(t)
