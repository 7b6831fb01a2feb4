"""What train_tiny_lm.py needs on several ranks: the mesh, a rank's share of the batch, checkpoints, a fault to show."""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from moe_ops import expert_parallel


class Ranks:
    """The processes that train together: one, or those of torchrun."""

    def __init__(self, ep: int = 0, timeout: float = 30.0) -> None:
        self.rank, self.world, self.mesh, self.group = 0, 1, None, None
        if ep:
            signal.signal(signal.SIGTERM, _end_soon)
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.mesh = init_device_mesh("cpu", (ep,), mesh_dim_names=("ep",))
            self.group = self.mesh.get_group("ep")

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients, but for the experts': those are of all ranks' tokens already."""
        if self.group is None:
            return model
        expert_parallel.ignore_in_ddp(model)
        return DistributedDataParallel(model, process_group=self.group)

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a batch that all ranks have drawn."""
        return batch.chunk(self.world)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        tensor = tensor.detach().clone()
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def kill_last(self) -> None:
        """The last rank ends as if the machine had lost power."""
        if self.rank == self.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def exit(self) -> None:
        """Ends the group and, where there was one, the process: call it last.

        By os._exit, because Gloo's threads outlive the group, and one that frees a tensor while the interpreter shuts
        down aborts.
        """
        if self.group is not None:
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)


def _end_soon(*_: Any) -> None:
    """torchrun ends the ranks that are left when one has failed; they have two seconds to say what they noticed."""
    timer = threading.Timer(2.0, os._exit, [1])
    timer.daemon = True
    timer.start()


class Checkpoints:
    """A folder of checkpoints that any number of ranks can load, whatever number has saved them."""

    def __init__(self, folder: str, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
        self.folder, self.model, self.optimizer, self.schedule = Path(folder), model, optimizer, schedule

    def _state(self, generator: torch.Generator) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        schedule = {"last_epoch": self.schedule.last_epoch}
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "generator": generator.get_state()}

    def save(self, step: int, generator: torch.Generator) -> None:
        """After so many steps; the generator is the one that draws the batches."""
        path = self.folder / f"step-{step:06d}"
        checkpoint.save(self._state(generator), checkpoint_id=path, no_dist=not dist.is_initialized())

    def load(self, generator: torch.Generator) -> int:
        """The newest one that is complete; returns after how many steps it was saved."""
        complete = sorted(path.parent for path in self.folder.glob("step-*/.metadata"))
        if not complete:
            raise SystemExit(f"--resume: {self.folder} must hold a checkpoint, got none")
        state = self._state(generator)
        checkpoint.load(state, checkpoint_id=complete[-1], no_dist=not dist.is_initialized())
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        generator.set_state(state["generator"])
        return int(complete[-1].name.removeprefix("step-"))
