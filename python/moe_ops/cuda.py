"""Loads the CUDA kernels where torch is a CUDA build and they were compiled; elsewhere CUDA tensors are refused.

Whatever stands in the way, the import goes on: the CPU needs none of it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from moe_ops.library import OPERATORS, directory

LIBRARY = "libmoe_ops_cuda.so"
_refusals = torch.library.Library("moe_ops", "IMPL")  # what is registered through it lasts as long as it does
_missing: str | None = "they are not loaded yet"


def load() -> None:
    """Loads the kernels, or registers the refusals. After library.load."""
    global _missing
    _missing = _load()
    if _missing is not None:
        for name in OPERATORS:
            _refusals.impl(name, _refuse(name, _missing), "CUDA")


def missing() -> str | None:
    """Why there are no CUDA kernels in this process; None where there are."""
    return _missing


def devices() -> Iterator[tuple[str, torch.device | None]]:
    """What to say of each CUDA device that torch sees; and the device, if this process has kernels for it."""
    from moe_ops import _C

    built = _C.build_facts()["cuda architectures"]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        what = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        if _missing is not None:
            yield f"{what}, not served", None
        elif not _C.has_cuda_kernels(built, 10 * major + minor):
            yield f"{what}, not served: the kernels are for {built}", None
        else:
            yield f"{what}, served", torch.device("cuda", index)


def _load() -> str | None:
    from moe_ops import _C

    path = directory() / LIBRARY
    if not path.is_file():
        return "this build of moe_ops has none"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    built = _C.build_facts()["cuda"]
    if built.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"they were compiled for CUDA {built}, torch {torch.__version__} for CUDA {torch.version.cuda}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path} does not load under torch {torch.__version__}: {error.__cause__ or error}"
    return None


def _refuse(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{name}: got CUDA tensors, but there are no CUDA kernels: {reason}. "
            "`FORCE_CUDA=1 pip install .` builds them, `python -m moe_ops` tells what is there"
        )

    return refuse
