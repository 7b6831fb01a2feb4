"""Loads the compiled libraries that lie beside the package: the operators' schemas, then the kernels of a device."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch

# Every operator, in the order of csrc/ops/library.cpp.
OPERATORS = (
    "route",
    "route_backward",
    "plan",
    "permute",
    "grouped_gemm",
    "grouped_gemm_weight_grad",
    "grouped_gemm_weight_grad_",
    "grouped_gemm_bias_grad",
    "combine",
    "combine_backward",
    "moe_mlp",
    "moe_mlp_inference",
    "moe_mlp_backward",
)

# What runs on CPU tensors: the CPU's kernels or, with MOE_OPS_DEVICE=simt, those of CUDA on an emulator, for tests.
EMULATED = os.environ.get("MOE_OPS_DEVICE") == "simt"
LIBRARIES = ("libmoe_ops.so", "libmoe_ops_simt.so" if EMULATED else "libmoe_ops_cpu.so")
OLDEST_TORCH = (2, 10)


def require_torch(version: str) -> None:
    """Raises ImportError for a torch that lacks the stable ABI the libraries were compiled for."""
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        raise ImportError(f"moe_ops needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, found torch {version}")


def directory() -> Path:
    """Where the libraries lie: beside the extension module, which an editable install keeps apart from the sources."""
    found = find_spec("moe_ops._C")
    return Path(found.origin).parent if found is not None and found.origin else Path(__file__).parent


def load() -> None:
    """Loads the libraries into this process; ImportError says which one is missing and what to do."""
    require_torch(torch.__version__)
    place = directory()
    missing = [name for name in LIBRARIES if not (place / name).is_file()]
    if missing:
        raise ImportError(
            f"moe_ops: {' and '.join(missing)} not found in {place}: the package was not compiled here; "
            "install it with `pip install .` (and do not import it from the source folder)"
        )
    for name in LIBRARIES:
        try:
            torch.ops.load_library(place / name)
        except OSError as error:
            raise ImportError(
                f"moe_ops: {place / name} does not load under torch {torch.__version__}: {error}"
            ) from error
