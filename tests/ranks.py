"""Real processes over Gloo on loopback: `run(4, function, ...)` calls it on every rank and gives what each returned."""

import functools
import itertools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

# Forked from a process that has imported torch once: a rank starts in a tenth of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "moe_ops"])

_stores = itertools.count()

TIMEOUT = 60.0  # seconds, of a process group unless a test of faults says otherwise


class Failed(AssertionError):
    """What was raised on a rank: its traceback, and when."""

    @property
    def time(self):
        """In seconds of the machine's monotonic clock, which all processes share."""
        return self.args[1]

    def __str__(self):
        return self.args[0]


class Lost(Failed):
    """A rank that died or gave no answer in time."""


def _rank(function, arguments, rank, world, store, timeout, answer):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        method = f"file://{store}"
        dist.init_process_group("gloo", method, timedelta(seconds=timeout), world_size=world, rank=rank)
        result, error = function(*arguments), None
    except Exception:
        result, error = None, Failed(f"rank {rank}: {traceback.format_exc()}", time.monotonic())
    answer.send_bytes(pickle.dumps((result, error)))  # whole: tensors are not shared with a rank that ends
    answer.close()
    if error is None and dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _folder():
    """Where the ranks of a group find each other; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="moe_ops_ranks")


def start(world, function, *arguments, timeout=TIMEOUT):
    """Starts the ranks; returns their processes and the ends of the pipes on which they answer (result, error)."""
    store = os.path.join(_folder().name, f"store{next(_stores)}")
    processes, answers = [], []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        given = (function, arguments, rank, world, store, timeout, theirs)
        process = _context.Process(target=_rank, args=given, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        answers.append(ours)
    return processes, answers


def gather(processes, answers, patience=120.0, without=None):
    """The (result, error) of every rank; Lost is the error of one that died or gave no answer in time.

    without: a rank whose answer is not waited for.
    """
    deadline = time.monotonic() + patience
    outcomes = [(None, Lost(f"rank {rank} gave no answer", deadline)) for rank in range(len(answers))]
    open_ends = dict(zip(answers, range(len(answers)), strict=True))
    while set(open_ends.values()) - {without} and (left := deadline - time.monotonic()) > 0:
        for end in wait(list(open_ends), left):
            rank = open_ends.pop(end)
            try:
                outcomes[rank] = pickle.loads(end.recv_bytes())
            except EOFError:
                outcomes[rank] = (None, Lost(f"rank {rank} died", time.monotonic()))
    for process in processes:
        process.join(5 if not open_ends else 0)
        if process.is_alive():
            process.kill()
    return outcomes


def run(world, function, *arguments, timeout=TIMEOUT):
    """What function(*arguments) returns on every rank of a process group of that size; raises what was raised first."""
    outcomes = gather(*start(world, function, *arguments, timeout=timeout))
    errors = [error for _, error in outcomes if error is not None]
    if errors:
        raise min(errors, key=lambda error: error.time)
    return [result for result, _ in outcomes]
