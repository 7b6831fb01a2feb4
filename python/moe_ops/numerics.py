"""The switches that choose among kernels by their numbers: torch's TF32, which is CUDA's, and batch invariance.

Both are read when an operator is called and travel as its arguments, so that backward does what forward did and a
traced program keeps what it was traced with (torch.compile traces again after a change).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moe_ops import checks, library

_batch_invariant = False


def allow_tf32(x: Tensor) -> bool:
    """Whether torch's switch lets the float32 products of these tokens be rounded to TF32."""
    return x.dtype == torch.float32 and (x.is_cuda or library.EMULATED) and _torch_allows_tf32()


def _read_switch() -> bool:
    """What torch.backends.cuda.matmul.allow_tf32, .fp32_precision, torch.backends.fp32_precision and
    torch.set_float32_matmul_precision set: fp32_precision can be read whichever of them was used."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


# A constant to torch.compile, which guards the switch: torch's own products depend on it.
_torch_allows_tf32: Callable[[], bool] = torch.compiler.assume_constant_result(_read_switch)


def set_batch_invariant(enabled: bool) -> None:
    """Whether a row's result must have the same bits whatever other rows are in the batch; off by default.

    Off, few rows are faster and summed in another order than many. On CUDA these are up to 64 rows in all. On the
    CPU they are up to 4 rows of an expert (6 where weights have 16 bits; fewer where rows are long) whose weight is
    not prepacked and is contiguous along the reduction: such a weight and its PackedWeight may differ by rounding.
    On Hopper the gradient of the route weights also depends on the tiles, which the number of rows decides. On,
    every number of rows is summed in one order, more slowly for few. Then y of moe_mlp, grouped_gemm and combine,
    the gradients of x and of the route weights depend on a token's own rows alone (drops by capacity aside).
    Gradients of expert weights and biases, and the statistics of route, are sums over the batch.

    Args:
        enabled: for the whole process, from the next call on. backward follows the forward it belongs to.

    Raises:
        TypeError: enabled is no bool.
    """
    global _batch_invariant
    checks.flag("set_batch_invariant", "enabled", enabled)
    _batch_invariant = enabled


def is_batch_invariant() -> bool:
    """What set_batch_invariant chose."""
    return _batch_invariant
