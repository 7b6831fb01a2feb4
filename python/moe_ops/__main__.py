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
from types import SimpleNamespace
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


def facts() -> Iterator[tuple[str, str]]:
    """The lines of the report, but for those that need our own compiled module."""
    yield "moe_ops", f"{getattr(moe_ops, '__version__', 'unknown')} in {moe_ops.__file__}"
    yield DISTRIBUTION, installed(DISTRIBUTION)
    yield "python", f"{platform.python_version()} ({platform.python_implementation()}) in {sys.executable}"
    yield "torch", f"{torch.__version__} in {torch.__file__}"
    yield "system", f"{platform.platform()}, {' '.join(platform.libc_ver())}"
    yield "processor", processor()
    yield "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')})"
    yield "torch's CUDA", f"{torch.version.cuda or 'none'}, {torch.cuda.device_count()} devices"


def compiled_facts() -> Iterator[tuple[str, str]]:
    """What our compiled module tells."""
    from moe_ops import _C, cuda, library

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
    path, missing = library.directory() / cuda.LIBRARY, cuda.missing()
    if missing is None:
        yield "library", f"{path} ({path.stat().st_size} bytes)"
    else:
        failed = "FAILED: " if path.is_file() and torch.version.cuda is not None else ""
        yield "library", f"{failed}no CUDA kernels: {missing}"
    for index, (what, _) in enumerate(cuda.devices()):
        yield f"cuda:{index}", what


def compare(ours: Tensor, oracle: Tensor) -> str:
    """Ok, with the error relative to the largest value, or what is wrong; integers must be equal."""
    ours = ours.cpu()
    if not ours.is_floating_point():
        return "ok" if torch.equal(ours, oracle) else "FAILED: wrong integers"
    error = float((ours.double() - oracle).abs().max() / oracle.abs().max())
    return f"ok, error {error:.1e}" if error < 1e-5 else f"FAILED: error {error:.1e}"


def problem(device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
    """The tensors of a small layer."""
    tokens, experts, top_k, hidden, inner = 37, 5, 2, 48, 33
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, experts, generator=make)
    x = torch.randn(tokens, hidden, generator=make)
    w_in = torch.randn(experts, 2 * inner, hidden, generator=make)
    w_out = torch.randn(experts, hidden, inner, generator=make)
    weights, chosen = moe_ops.reference.route(logits, top_k)[:2]
    plan = moe_ops.reference.plan(chosen, experts)
    floats = {"logits": logits, "x": x, "rows": moe_ops.reference.permute(x, plan), "weights": weights}
    floats |= {"w_in": w_in, "w_out": w_out}
    return SimpleNamespace(
        **{name: value.to(device, dtype) for name, value in floats.items()},
        chosen=chosen.to(device),
        plan=type(plan)(*(value.to(device) for value in plan)),
        experts=experts,
        top_k=top_k,
    )


def gradient(m: Any, p: SimpleNamespace) -> Tensor:
    leaf = p.x.clone().requires_grad_()
    return torch.autograd.grad(m.moe_mlp(leaf, p.weights, p.chosen, p.w_in, p.w_out).sum(), leaf)[0]


# m is moe_ops or its reference, p the problem.
RUNS: dict[str, Callable[[Any, SimpleNamespace], Tensor]] = {
    "route, weights": lambda m, p: m.route(p.logits, p.top_k)[0],
    "route, experts": lambda m, p: m.route(p.logits, p.top_k)[1],
    "plan": lambda m, p: torch.cat([t.flatten() for t in m.plan(p.chosen, p.experts)]),
    "permute": lambda m, p: m.permute(p.x, p.plan),
    "grouped_gemm": lambda m, p: m.grouped_gemm(p.rows, p.w_in, p.plan.offsets),
    "combine": lambda m, p: m.combine(p.rows, p.weights, p.plan),
    "moe_mlp": lambda m, p: m.moe_mlp(p.x, p.weights, p.chosen, p.w_in, p.w_out),
    "moe_mlp, backward": gradient,
}


def self_check() -> Iterator[tuple[str, str]]:
    """Each operator on each device, on a small problem in float32, against the reference in float64."""
    from moe_ops import cuda

    oracle = problem(torch.device("cpu"), torch.float64)
    for device in [torch.device("cpu"), *(served for _, served in cuda.devices() if served is not None)]:
        where = "" if device.type == "cpu" else f", {device}"
        for name, run in RUNS.items():
            try:
                result = compare(run(moe_ops, problem(device, torch.float32)), run(moe_ops.reference, oracle))
            except Exception as error:  # the report goes on: it is there to show what fails
                result = f"FAILED: {type(error).__name__}: {error}"
            yield f"check: {name}{where}", result


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
