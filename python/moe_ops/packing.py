"""prepack: expert weights laid out ahead as the CPU's micro-kernel reads them."""

from typing import Any

import torch
from torch import Tensor

from moe_ops import _C, checks
from moe_ops.types import PackedWeight


def prepack(weight: Tensor, *, dtype: Any = None) -> PackedWeight:
    """Packs an expert weight for many calls of grouped_gemm or moe_mlp without gradients.

    For every use of the weight: w of grouped_gemm, w_in (plain, concatenated or interleaved) or w_out of moe_mlp. After
    set_batch_invariant(True) results are bitwise those of the weight as it is; without it, an expert's few rows may
    differ by rounding. It is a copy, without a gradient: later changes of the weight do not reach it.

    Args:
        weight: [E, N, K], any float dtype and strides, on the CPU.
        dtype: rounds to this torch.dtype first: that of the rows the weight will multiply. None: the weight's own.

    Returns:
        PackedWeight, of weight's size with N rounded up to 32 (float64: 16), and K to 2 in bfloat16 and float16.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    checks.floats("prepack", "weight", weight, "[experts, n, k]", 3)
    if weight.device.type != "cpu":
        raise ValueError(f"prepack: weight must be on the CPU, got {weight.device}")
    if dtype is not None and dtype not in checks.FLOATS:
        got = checks.name_of(dtype) if isinstance(dtype, torch.dtype) else checks.kind(dtype)
        raise TypeError(f"prepack: dtype must be None, float32, bfloat16, float16 or float64, got {got}")
    dtype = weight.dtype if dtype is None else dtype
    columns, values = (16 if dtype == torch.float64 else 32), (2 if dtype.itemsize == 2 else 1)
    experts, n, k = weight.shape
    count, steps = -(-n // columns), -(-k // values)
    panels = torch.empty(experts, count, steps, columns, values, dtype=dtype, device=weight.device)
    if type(panels) is Tensor and not torch.compiler.is_compiling():  # fake tensors have no memory
        _C.ask_for_huge_pages(panels.data_ptr(), panels.nbytes)
    missing = (0, steps * values - k, 0, count * columns - n)
    for matrix, to in zip(weight.detach(), panels, strict=True):  # one at a time: little memory beside the result's
        padded = torch.nn.functional.pad(matrix.to(dtype), missing)
        to.copy_(padded.view(count, columns, steps, values).transpose(1, 2))
    return PackedWeight(panels, panels.new_zeros(()).expand(experts, n, k))


def operand(w: Any) -> tuple[Any, Tensor | None]:
    """What an operator takes for a weight: the tensor, and the panels where it is packed."""
    if not isinstance(w, PackedWeight):
        return w, None
    checks.tensor("PackedWeight", "panels", w.panels, "[experts, panels, steps, columns, values]", 5)
    return w.stand_in, w.panels


def check(op: str, name: str, weight: Tensor, panels: Tensor | None, first_name: str, first: Tensor) -> None:
    """What a packed weight asks beyond a plain one."""
    if panels is not None:
        checks.same_device(op, f"{name}.panels", panels, first_name, first)
    if panels is not None and weight.dtype != first.dtype:
        wanted = checks.name_of(first.dtype)
        raise TypeError(
            f"{op}: {name}, a PackedWeight, must have the dtype of {first_name} ({wanted}), as prepack(weight, "
            f"dtype=torch.{wanted}) makes it, got {checks.name_of(weight.dtype)}"
        )


def check_mlp(
    x: Any,
    weights: Any,
    w_in: Any,
    w_out: Any,
    gated: bool,
    b_in: Any,
    b_out: Any,
    panels_in: Tensor | None,
    panels_out: Tensor | None,
) -> None:
    """The operands of moe_mlp."""
    checks.moe_mlp(x, weights, w_in, w_out, gated, b_in, b_out)
    check("moe_mlp", "w_in", w_in, panels_in, "x", x)
    check("moe_mlp", "w_out", w_out, panels_out, "x", x)


def no_gradient(op: str, name: str, panels: Tensor | None, *operands: Tensor | None) -> None:
    if panels is None or not torch.is_grad_enabled():
        return
    if any(operand is not None and operand.requires_grad for operand in operands):
        raise RuntimeError(
            f"{op}: {name} is a PackedWeight, which has no gradient, and an operand requires one: "
            "call it under torch.no_grad(), or with the weight itself"
        )
