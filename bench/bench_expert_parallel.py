"""Experts spread over ranks: time, the share of it that waits for the exchange, bytes, and how a rank's death is told.

python bench/bench_expert_parallel.py --ranks 2 --tokens 2048 --hidden 1024 --inner 1024 --experts 8 --top-k 2

Processes over Gloo on loopback, one thread each. "exposed" is the time in which a rank did nothing but wait for rows or
counts; "one rank" is the same batch and all experts in one process of as many threads as there are ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ops
from moe_ops import expert_parallel
from moe_ops.exchange import legs, wire
from moe_ops.exchange.sending import owned

context = multiprocessing.get_context("spawn")


class Waiting:
    """Sums the seconds spent in calls of a module's function."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, module: Any, name: str) -> None:
        call = getattr(module, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(module, name, timed)


class Traffic(TorchDispatchMode):
    """Bytes sent to other ranks, those of rows and all."""

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank, self.dtype, self.rows, self.all = rank, dtype, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, send, _ = args
            sent = (sum(send) - send[self.rank]) * x.shape[1] * x.element_size()
            self.all += sent
            self.rows += sent if x.dtype == self.dtype else 0
        return func(*args, **(kwargs or {}))


def batch(a: argparse.Namespace, rank: int, world: int) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(rank)
    tokens, (first, last) = a.tokens // world, owned(a.experts, rank, world)
    dtype = getattr(torch, a.dtype)
    inputs = {
        "x": torch.randn(tokens, a.hidden),
        "weights": torch.rand(tokens, a.top_k),
        "w_in": torch.randn(last - first, 2 * a.inner, a.hidden) * a.hidden**-0.5,
        "w_out": torch.randn(last - first, a.hidden, a.inner) * a.inner**-0.5,
    }
    inputs = {name: (t if name == "weights" else t.to(dtype)).requires_grad_() for name, t in inputs.items()}
    return inputs, torch.rand(tokens, a.experts).topk(a.top_k).indices.int()


def shared_expert(a: argparse.Namespace, x: Tensor) -> Callable[[], Tensor]:
    w = torch.randn(a.hidden, a.hidden, dtype=x.dtype)
    return lambda: torch.relu(x @ w) @ w


def step(call: Callable[[], Tensor], waiting: Waiting, world: int) -> tuple[float, float]:
    """(seconds, seconds exposed) of forward and backward, the larger of any rank."""
    if world > 1:
        dist.barrier()
    waiting.seconds, begin = 0.0, time.perf_counter()
    call().sum().backward()
    took = torch.tensor([time.perf_counter() - begin, waiting.seconds], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(took, dist.ReduceOp.MAX)
    return took[0].item(), took[1].item()


def layer(a: argparse.Namespace, rank: int, world: int) -> dict[str, Any]:
    inputs, ids = batch(a, rank, world)
    waiting = Waiting()
    waiting.watch(wire, "_wait")
    waiting.watch(legs, "exchange_counts")
    waiting.watch(legs, "agree")
    shared = shared_expert(a, inputs["x"])
    exchange = {"group": dist.group.WORLD, "num_experts": a.experts, **inputs, "experts": ids}
    variants: dict[str, Callable[[], Tensor]] = {}
    for chunks in (1, 2, 4):
        for mode in ("exact", "bounded"):
            options = {"chunks": chunks, "mode": mode}
            variants[f"{mode}, chunks={chunks}"] = lambda o=options: expert_parallel.moe_mlp(**exchange, **o)
    variants["exact, chunks=1, shared behind it"] = lambda: expert_parallel.moe_mlp(**exchange, shared=shared)
    variants["exact, chunks=1, shared after it"] = lambda: expert_parallel.moe_mlp(**exchange) + shared()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(a.rounds + 1):  # the first warms up
        for name, call in variants.items():
            found[name].append(step(call, waiting, world))
    results: dict[str, Any] = {name: pairs[1:] for name, pairs in found.items()}
    with Traffic(rank, inputs["x"].dtype) as traffic:
        expert_parallel.moe_mlp(**exchange)
    ranks = ids // -(-a.experts // world)
    leave = sum(int((ranks == other).any(1).sum()) for other in range(world) if other != rank)
    row = a.hidden * inputs["x"].element_size()
    least = torch.tensor([leave * row])
    come = torch.tensor([traffic.rows, traffic.all])
    dist.all_reduce(least)
    dist.all_reduce(come)
    results["bytes"] = (2 * least.item(), *come.tolist())  # each row that leaves brings a sum back
    return results


def death(a: argparse.Namespace, rank: int, world: int) -> float:
    """Seconds from rank 1's death to the exception on this rank; the clock is the machine's."""
    inputs, ids = batch(a, rank, world)
    expert_parallel.moe_mlp(**inputs, experts=ids, group=dist.group.WORLD, num_experts=a.experts)
    moment = torch.tensor([time.monotonic() + 0.5], dtype=torch.float64)
    dist.broadcast(moment, 1)
    try:
        while True:
            if rank == 1 and time.monotonic() >= moment.item():
                os.kill(os.getpid(), signal.SIGKILL)
            expert_parallel.moe_mlp(**inputs, experts=ids, group=dist.group.WORLD, num_experts=a.experts)
    except RuntimeError:
        return time.monotonic() - moment.item()


def worker(a: argparse.Namespace, job: Callable[..., Any], rank: int, world: int, store: str, answer: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=60), world, rank)
    answer.send(job(a, rank, world))


def on_ranks(a: argparse.Namespace, job: Callable[..., Any], world: int) -> list[Any]:
    """What job says on every rank; None for one that died."""
    store, answers, processes = os.path.join(tempfile.mkdtemp(), "store"), [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=worker, args=(a, job, rank, world, store, theirs)))
        processes[-1].start()
        theirs.close()
        answers.append(ours)
    said = []
    for answer in answers:
        try:
            said.append(answer.recv())
        except EOFError:
            said.append(None)
    for process in processes:
        process.join()
    return said


def one_rank(a: argparse.Namespace) -> float:
    torch.set_num_threads(a.ranks)
    inputs, ids = batch(a, 0, 1)
    call = lambda: moe_ops.moe_mlp(**inputs, experts=ids)  # noqa: E731
    return statistics.median(step(call, Waiting(), 1)[0] for _ in range(a.rounds + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"ranks": 2, "tokens": 2048, "hidden": 1024, "inner": 1024, "experts": 8, "top_k": 2, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    a = parser.parse_args()
    results = on_ranks(a, layer, a.ranks)[0]
    least, rows, everything = results.pop("bytes")
    print(f"{a}\ntorch {torch.__version__}, {os.cpu_count()} cores\n")
    print(f"{'forward and backward':<36}{'median ms':>10}{'exposed':>9}")
    for name, pairs in results.items():
        median = statistics.median(seconds for seconds, _ in pairs)
        exposed = statistics.median(waited / seconds for seconds, waited in pairs)
        print(f"{name:<36}{median * 1e3:>10.1f}{exposed:>9.0%}")
    print(f"{'one rank':<36}{one_rank(a) * 1e3:>10.1f}")
    share = 0.0 if least == 0 else everything / least - 1
    print(f"\nbytes of rows, forward: {rows} of {least} needed; with ids and weights {share:.1%} more")
    if a.ranks > 1:
        times = [said for said in on_ranks(a, death, a.ranks) if said is not None]
        print(f"from a rank's death to the last exception: {max(times):.2f} s")


if __name__ == "__main__":
    main()
