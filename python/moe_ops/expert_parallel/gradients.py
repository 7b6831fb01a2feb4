"""Gradients of a model whose experts are spread over ranks: their scale, their norm, and what DDP may average."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moe_ops import module_checks
from moe_ops.expert_parallel.sharding import is_sharded


class Scale(torch.autograd.Function):
    """x forward; backward the gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for parameters some of which are sharded over ranks, by any meshes.

    The norm is that of all gradients together, as if one rank had them: what is sharded (DTensors, of expert
    parallelism, FSDP2 or both) is summed over the ranks of its shards, what is not counts once. torch's own function
    refuses plain tensors beside DTensors, and DTensors of two meshes.

    Args:
        parameters: with their gradients; every rank gives them in the same order. Those that are no DTensors must have
            the same gradients on every rank, as after DistributedDataParallel.
        max_norm: gradients are scaled in place to this norm if theirs is larger.
        norm_type: p of the norm; inf for the largest magnitude.
        error_if_nonfinite: raises where the norm is NaN or infinite.

    Returns:
        The norm before, a scalar; the same bits on every rank of a mesh.

    Raises:
        TypeError, ValueError: an argument is wrong, or a gradient is a DTensor with a Partial placement.
        RuntimeError: the norm is not finite, and error_if_nonfinite.
    """
    op = "clip_grad_norm_"
    listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for parameter in listed:
        module_checks.instance(op, "parameters", parameter, (Tensor,), "a Tensor or an iterable of Tensors")
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        module_checks.instance(op, name, value, (int, float), "a number")
        if not value > 0:
            raise ValueError(f"{op}: {name} must be greater than 0, got {value}")
    # Gradients as this rank holds them, by the groups over which they are sharded; () for what every rank has whole. A
    # parameter without a gradient has its groups too: what they reduce, they reduce on all ranks.
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in listed:
        gradients = kinds.setdefault(_groups(op, parameter), [])
        if parameter.grad is not None:
            _groups(op, parameter.grad)
            gradients.append(_local(parameter.grad))
    if not kinds:
        return torch.zeros(())
    dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in listed), torch.float32)
    zero = torch.zeros((), dtype=dtype, device=_local(listed[0]).device)
    norms = [_norm(gradients, groups, float(norm_type), zero) for groups, gradients in kinds.items()]
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not bool(total.isfinite()):
        raise RuntimeError(f"{op}: the norm of order {norm_type} must be finite, got {total.item()}")
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in (each for gradients in kinds.values() for each in gradients):
        gradient.mul_(factor.to(gradient.device))
    return total


def _local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def _groups(op: str, tensor: Any) -> tuple[Any, ...]:
    """The process groups whose ranks hold different parts of a tensor."""
    if not is_sharded(tensor):
        return ()
    mesh, groups = tensor.device_mesh, []
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError(f"{op}: gradients must be sharded or replicated, got placements {tensor.placements}")
        if not placement.is_replicate() and mesh.size(dimension) > 1:
            groups.append(mesh.get_group(dimension))
    return tuple(groups)


def _norm(gradients: list[Tensor], groups: tuple[Any, ...], p: float, zero: Tensor) -> Tensor:
    """The norm over gradients of this rank and of the others that hold parts; zero says where, and in which dtype."""
    filled = [gradient for gradient in gradients if gradient.numel()]  # an empty one has no largest magnitude
    norm = torch.nn.utils.get_total_norm(filled, p).to(zero) if filled else zero.clone()
    if not groups:
        return norm
    total = norm if math.isinf(p) else norm**p
    reduce = torch.distributed.ReduceOp.MAX if math.isinf(p) else torch.distributed.ReduceOp.SUM
    for group in groups:
        torch.distributed.all_reduce(total, reduce, group=group)
    return total if math.isinf(p) else total ** (1 / p)


def ignore_in_ddp(model: torch.nn.Module) -> list[str]:
    """Makes DistributedDataParallel(model) leave the experts alone, which every rank has its own of; call it before.

    Returns:
        The names of the parameters that DDP will neither broadcast nor average: the DTensors.
    """
    module_checks.instance("ignore_in_ddp", "model", model, (torch.nn.Module,), "a Module")
    names = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    parallel: Any = torch.nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names
