"""Which rank owns which experts: the weight of E experts is a DTensor, Shard(0) over the mesh dimension "ep".

DTensor comes with torch.distributed.tensor, which is imported where it is needed: it takes half a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks
from moe_ops.exchange.sending import owned

DIMENSION = "ep"


def is_sharded(weight: Any) -> bool:
    """Whether this is a DTensor; torch's module is not imported to find out."""
    return hasattr(weight, "to_local") and hasattr(weight, "placements")


def ep_mesh(op: str, mesh: Any) -> Any:
    """The one-dimensional DeviceMesh of the dimension "ep" of a mesh."""
    from torch.distributed.device_mesh import DeviceMesh

    expected = f'a DeviceMesh with a dimension named "{DIMENSION}"'
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{op}: mesh must be {expected}, got {checks.kind(mesh)}")
    names = mesh.mesh_dim_names or ()
    if DIMENSION not in names:
        raise ValueError(f"{op}: mesh must be {expected}, got dimensions {names or 'without names'}")
    if mesh.get_coordinate() is None:
        raise ValueError(f"{op}: mesh must hold this rank, got the ranks {mesh.mesh.flatten().tolist()}")
    return mesh[DIMENSION] if len(names) > 1 else mesh


def empty(op: str, shape: tuple[int, ...], mesh: Any, *, device: Any, dtype: torch.dtype | None) -> Tensor:
    """A weight [experts, ...] as a DTensor: this rank's memory holds its own experts only."""
    from torch.distributed.tensor import DTensor, Shard

    first, last = owned(shape[0], mesh.get_local_rank(), mesh.size())
    mine = torch.empty(last - first, *shape[1:], device=device, dtype=dtype)
    if mine.device.type not in (mesh.device_type, "meta"):
        raise ValueError(f"{op}: device must be {mesh.device_type!r}, the mesh's, or 'meta', got {mine.device.type!r}")
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def each_expert(weight: Tensor) -> Iterator[Tensor]:
    """Every expert's part of a weight [experts, ...], in order, to be filled in place.

    Where another rank owns an expert, or a part of it (FSDP), memory of one expert stands in and what was drawn for the
    other ranks is thrown away: all ranks draw the same numbers in the same order, those of one rank.
    """
    if not is_sharded(weight):
        yield from weight.unbind(0)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = weight
    mine = sharded.to_local()
    shape, first = compute_local_shape_and_global_offset(weight.shape, sharded.device_mesh, sharded.placements)
    part = tuple(slice(start, start + size) for start, size in zip(first[1:], shape[1:], strict=True))
    scratch = torch.empty(weight.shape[1:], dtype=mine.dtype, device=mine.device)
    for expert in range(weight.shape[0]):
        here = 0 <= expert - first[0] < shape[0]
        if here and shape[1:] == weight.shape[1:]:
            yield mine[expert - first[0]]
            continue
        yield scratch
        if here:
            mine[expert - first[0]].copy_(scratch[part])
