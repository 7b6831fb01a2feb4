"""python -m moe_ops: a diagnosis to paste into a bug report. Ends with 1 if something is wrong.

It also runs, and says so, where another distribution's `moe_ops` shares our folder. Where that one has taken our place
altogether, the command torch-moe-ops still runs.
"""

import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import moe_ops
from torch_moe_ops import DISTRIBUTION, foreign, installed


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


def devices() -> str:
    """The devices that torch sees, and which of them this version serves."""
    if not torch.cuda.is_available():
        return "cpu"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"cpu; torch also sees {', '.join(names)}, which this version of moe_ops does not support"


def facts() -> Iterator[tuple[str, str]]:
    """The lines of the report, but for those that need our own compiled module."""
    yield "moe_ops", f"{getattr(moe_ops, '__version__', 'unknown')} in {moe_ops.__file__}"
    yield DISTRIBUTION, installed(DISTRIBUTION)
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) in {sys.executable}"
    yield "torch", f"{torch.__version__} in {torch.__file__}"
    yield "system", f"{platform.platform()}, {' '.join(platform.libc_ver())}"
    yield "processor", processor()
    yield "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')})"
    yield "devices", devices()


def compiled_facts() -> Iterator[tuple[str, str]]:
    """What our compiled module tells."""
    from moe_ops import _C, library

    chosen, found = _C.instruction_set(), ", ".join(_C.instruction_sets())
    yield (
        "instruction sets",
        f"{chosen} chosen of {found} (MOE_OPS_CPU_ISA={os.environ.get('MOE_OPS_CPU_ISA', '')})",
    )
    for name, value in _C.build_facts().items():
        yield f"built: {name}", value
    for name in library.LIBRARIES:
        path = library.directory() / name
        yield "library", f"{path} ({path.stat().st_size} bytes)"


def compare(ours: Tensor, oracle: Tensor) -> str:
    """Ok, with the error relative to the largest value, or what is wrong; integers must be equal."""
    if not ours.is_floating_point():
        return "ok" if torch.equal(ours, oracle) else "FAILED: wrong integers"
    error = float((ours.double() - oracle).abs().max() / oracle.abs().max())
    return f"ok, error {error:.1e}" if error < 1e-5 else f"FAILED: error {error:.1e}"


def self_check() -> Iterator[tuple[str, str]]:
    """Each operator on a small problem in float32, against the reference in float64."""
    tokens, experts, top_k, hidden, inner = 37, 5, 2, 48, 33
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=make)
    x = torch.randn(tokens, hidden, generator=make)
    w_in = torch.randn(experts, 2 * inner, hidden, generator=make)
    w_out = torch.randn(experts, hidden, inner, generator=make)
    weights, chosen = moe_ops.reference.route(logits, top_k)[:2]
    plan = moe_ops.reference.plan(chosen, experts)
    rows = moe_ops.reference.permute(x, plan)

    def gradient(m: Any, to: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = to(x).clone().requires_grad_()
        return torch.autograd.grad(m.moe_mlp(leaf, to(weights), chosen, to(w_in), to(w_out)).sum(), leaf)[0]

    # m is moe_ops or its reference, `to` brings tensors to the dtype of the run.
    runs: dict[str, Callable[[Any, Callable[[Tensor], Tensor]], Tensor]] = {
        "route, weights": lambda m, to: m.route(to(logits), top_k)[0],
        "route, experts": lambda m, to: m.route(to(logits), top_k)[1],
        "plan": lambda m, to: torch.cat([t.flatten() for t in m.plan(chosen, experts)]),
        "permute": lambda m, to: m.permute(to(x), plan),
        "grouped_gemm": lambda m, to: m.grouped_gemm(to(rows), to(w_in), plan.offsets),
        "combine": lambda m, to: m.combine(to(rows), to(weights), plan),
        "moe_mlp": lambda m, to: m.moe_mlp(to(x), to(weights), chosen, to(w_in), to(w_out)),
        "moe_mlp, backward": gradient,
    }
    for name, run in runs.items():
        try:
            result = compare(run(moe_ops, Tensor.float), run(moe_ops.reference, Tensor.double))
        except Exception as error:  # the report goes on: it is there to show what fails
            result = f"FAILED: {type(error).__name__}: {error}"
        yield f"check: {name}", result


def main() -> int:
    """Prints the report; 1 if something is wrong."""
    problems = foreign(moe_ops)
    sections = [facts()] if problems else [facts(), compiled_facts(), self_check()]
    try:
        for name, value in itertools.chain.from_iterable(sections):
            print(f"{name:<25} {value}", flush=True)
            if value.startswith("FAILED"):
                problems.append(f"{name}: {value}")
    except (ImportError, ValueError) as error:
        problems.append(str(error))
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("something is wrong: see above" if problems else "all is well")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
