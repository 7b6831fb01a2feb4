"""What a caller of the losses and modules can get wrong; what they hand on to the operators is checked there."""

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks
from moe_ops.types import NoisyRouteResult, RouteResult


def load(op: str, route: Any) -> tuple[Tensor, Tensor]:
    """The statistics that the load-balancing loss reads: counts and mean_prob."""
    if isinstance(route, (RouteResult, NoisyRouteResult)):
        counts, mean_prob = route.counts, route.mean_prob
    elif isinstance(route, (tuple, list)) and len(route) == 2:
        counts, mean_prob = route
    else:
        expected = "a RouteResult or a pair (counts, mean_prob)"
        raise TypeError(f"{op}: route must be {expected}, got {checks.kind(route)}")
    layout = "[segments, experts]"
    checks.tensor(op, "route.counts", counts, layout, 2)
    if counts.dtype != torch.int32 and counts.dtype != torch.int64:
        expected = "of dtype int32 or int64 (call route with stats=True)"
        raise TypeError(f"{op}: route.counts must be {expected}, got {checks.name_of(counts.dtype)}")
    checks.floats(op, "route.mean_prob", mean_prob, layout, 2)
    checks.shape(op, "route.mean_prob", mean_prob, layout, tuple(counts.shape))
    checks.same_device(op, "route.mean_prob", mean_prob, "route.counts", counts)
    return counts, mean_prob


def last_dim(op: str, name: str, value: Any, expected: int) -> None:
    """A reshape would take a multiple of the last dimension for more tokens."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor of shape [..., {expected}], got {checks.kind(value)}")
    if value.dim() < 1 or value.shape[-1] != expected:
        raise ValueError(f"{op}: {name} must be of shape [..., {expected}], got {list(value.shape)}")


def tokens(op: str, x: Any, hidden: int) -> None:
    """Tokens of a module, with any leading dimensions."""
    last_dim(op, "x", x, hidden)
    checks.floats(op, "x", x, f"[..., {hidden}]", x.dim())


def group(op: str, value: Any) -> None:
    """A process group of torch.distributed, or none."""
    if value is not None and not (
        torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)
    ):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup or None, got {checks.kind(value)}")


def token_ids(op: str, value: Any, x: Tensor) -> Tensor | None:
    """The vocabulary ids of tokens x [..., hidden], flattened."""
    if value is None:
        return None
    checks.ids(op, "token_ids", value, "[...]", x.dim() - 1)
    checks.shape(op, "token_ids", value, "[...]", tuple(x.shape[:-1]))
    checks.same_device(op, "token_ids", value, "x", x)
    return value.reshape(-1)


def parameters(op: str, dtype: Any) -> None:
    """The dtype of a module's parameters."""
    if dtype is not None and dtype not in checks.FLOATS:
        got = checks.name_of(dtype) if isinstance(dtype, torch.dtype) else checks.kind(dtype)
        raise TypeError(f"{op}: dtype must be None, float32, bfloat16, float16 or float64, got {got}")


def instance(op: str, name: str, value: Any, types: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types):
        raise TypeError(f"{op}: {name} must be {expected}, got {checks.kind(value)}")


def pair(op: str, name: str, value: Any, layout: str) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be a pair {layout}, got {checks.kind(value)}")


def sizes(op: str, **values: Any) -> None:
    for name, value in values.items():
        checks.integer(op, name, value, 1, checks.MAX_INT32 - 1)


def flags(op: str, **values: Any) -> None:
    for name, value in values.items():
        checks.flag(op, name, value)
