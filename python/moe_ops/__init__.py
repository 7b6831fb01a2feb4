"""Mixture-of-Experts operators for PyTorch: everything between a router's logits and the combined output of the layer.

    logits --route--> weights, experts --plan--> offsets, row_slot, slot_row
    x --permute--> rows --grouped_gemm--> inner --grouped_gemm--> rows --combine--> y

dispatch is plan and permute; moe_mlp is the fused path from tokens to tokens.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

from moe_ops import expert_parallel, losses, nn, reference
from moe_ops.config import MoEConfig
from moe_ops.functional import combine, dispatch, moe_mlp
from moe_ops.monitor import RouterHealth, RouterReplay
from moe_ops.numerics import is_batch_invariant, set_batch_invariant
from moe_ops.ops import grouped_gemm, permute, plan, route
from moe_ops.packing import prepack
from moe_ops.types import ExpertParallelPlan, PackedWeight, Plan, RouteResult

from moe_ops import _C as _C  # isort: skip  # after ops, which loads the libraries it needs

if sys.argv[:1] != ["-m"]:  # python -m moe_ops, which puts it in its report
    try:
        _C.instruction_set()
    except ValueError as error:
        raise ImportError(f"{error} (the environment variable MOE_OPS_CPU_ISA chose it)") from None

try:
    __version__ = version("torch-moe-ops")
except PackageNotFoundError:
    __version__ = "0.0.0"  # compiled in place, not installed

__all__ = [
    "ExpertParallelPlan",
    "MoEConfig",
    "PackedWeight",
    "Plan",
    "RouteResult",
    "RouterHealth",
    "RouterReplay",
    "__version__",
    "combine",
    "dispatch",
    "expert_parallel",
    "grouped_gemm",
    "is_batch_invariant",
    "losses",
    "moe_mlp",
    "nn",
    "permute",
    "plan",
    "prepack",
    "reference",
    "route",
    "set_batch_invariant",
]
