"""What autocast means to the operators that multiply matrices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def operands(x: Any, *experts: Any) -> tuple[Any, ...]:
    """The tokens and the expert weights and biases as autocast wants them; as they are where it is off.

    The tokens go to the autocast dtype. Float32 expert weights stay as they are: the operators round them to the
    tokens' dtype while they read them, which gives the same products without a copy, and their gradient is float32.
    Float64 tokens are left alone, as torch does.
    """
    if not isinstance(x, Tensor):
        return x, *experts
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta tensors have no autocast
        return x, *experts
    dtype = torch.get_autocast_dtype(device)
    if x.dtype == torch.float64 or not x.dtype.is_floating_point:
        return x, *experts
    return x.to(dtype), *(_converted(value, dtype) for value in experts)


def _is_enabled() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


# Whether autocast is on for any device: one question where torch has it, otherwise one for each.
is_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", _is_enabled)


def _converted(value: Any, dtype: torch.dtype) -> Any:
    halves = (torch.bfloat16, torch.float16)
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype in halves else value
