"""Which options of moe_mlp say what an experts module does between its two products.

Models write their own `_apply_gate`, and a later version of transformers may change one without a word. So a gate is
recognised by what it computes: it is run once on a grid of numbers and compared with every formula that moe_mlp has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
LIMITS, ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")  # the names modules keep them under
QUICK_GELU = 1.702
# Both signs, from what no clamp reaches to what every clamp does.
VALUES = (0.0, 1e-3, 0.1, 0.3, 0.7, 1.0, 1.6, 2.4, 3.3, 4.5, 5.9, 6.9, 7.1, 8.8, 9.9, 10.1, 12.0, 16.5, 40.0, 300.0)

CACHE = "_moe_ops_gate"  # the attribute that keeps what was measured, and of what

Pairs = tuple[tuple[str, Any], ...]  # of keyword and value: a dict that stands for a constant cannot be traced


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def options(experts: torch.nn.Module, has_gate: bool) -> Pairs | None:
    """The keywords of moe_mlp that compute what this module's `_apply_gate` (or `act_fn`, without gate) does, or None.

    Measured once per module, and again when a number that it keeps has changed.
    """
    numbers = {
        name: value for name, value in vars(experts).items() if isinstance(value, (int, float)) and name != "training"
    }
    known = vars(experts).get(CACHE)
    if known is None or known[0] != numbers:
        limits, alphas = ([float(numbers[name]) for name in names if name in numbers] for names in (LIMITS, ALPHAS))
        said = _measure_gate(experts, limits, alphas) if has_gate else _measure_activation(experts.act_fn)
        known = (numbers, said)
        vars(experts)[CACHE] = known
    return known[1]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def of_activation(module: torch.nn.Module, name: str) -> Pairs | None:
    """As options, of the module's activation under this name: without a gate."""
    known = vars(module).get(CACHE)
    if known is None or known[0] != name:
        known = (name, _measure_activation(getattr(module, name)))
        vars(module)[CACHE] = known
    return known[1]


def _measure_activation(act: Any) -> Pairs | None:
    grid = _half()
    got = _run(act, grid)
    return next((tuple(said.items()) for said, formula in _plain() if _same(formula(grid), got)), None)


def _measure_gate(experts: Any, limits: list[float], alphas: list[float]) -> Pairs | None:
    half = _half()
    gate, up = (grid.reshape(1, -1) for grid in torch.meshgrid(half, half, indexing="ij"))
    got = {
        "concatenated": _run(experts._apply_gate, torch.cat([gate, up], dim=-1)),
        "interleaved": _run(experts._apply_gate, torch.stack([gate, up], dim=-1).flatten(1)),
    }
    for said, formula in _gated(limits, alphas):
        expected = formula(gate, up)
        for layout, result in got.items():
            if _same(expected, result):
                return (("gated", True), ("layout", layout), *said.items())
    return None


def _half() -> Tensor:
    return torch.tensor(sorted({*VALUES, *(-value for value in VALUES)}))


def _run(formula: Callable[[Tensor], Tensor], values: Tensor) -> Tensor | None:
    """None where it cannot run on these numbers: such a one moe_mlp does not know."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return formula(values)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def _plain() -> Iterator[tuple[dict[str, Any], Callable[[Tensor], Tensor]]]:
    for name, act in ACTIVATIONS.items():
        yield {"gated": False, "activation": name}, act
    yield {"gated": False, "activation": "silu", "alpha": QUICK_GELU}, _silu(QUICK_GELU)


def _gated(
    limits: list[float], alphas: list[float]
) -> Iterator[tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]]:
    acts: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
        ({"activation": name}, act) for name, act in ACTIVATIONS.items()
    ]
    for alpha in {QUICK_GELU, *alphas}:
        acts.append(({"activation": "silu", "alpha": alpha}, _silu(alpha)))
    bounds = [None, *(limit for limit in limits if 0 < limit < math.inf)]
    for (said, act), limit, offset in itertools.product(acts, bounds, (0.0, 1.0)):

        def formula(
            gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor] = act, limit: Any = limit, offset: float = offset
        ) -> Tensor:
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return act(gate) * (up + offset)

        yield {**said, "limit": limit, "up_offset": offset}, formula


def _silu(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda z: z * torch.sigmoid(alpha * z)


def _same(expected: Tensor, got: Any) -> bool:
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    return torch.allclose(got.float(), expected, rtol=1e-5, atol=1e-6)
