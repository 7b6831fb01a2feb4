"""LossFreeBalancing: moves the selection biases of a model's routers once per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks, ops
from moe_ops.nn.router import Router


class LossFreeBalancing:
    """Loss-free balancing (Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3) of every router with a correction bias.

    Counts, in training, the slots per expert of all calls since the last update: micro-batches add up, and activation
    checkpointing, which calls every router twice, changes no sign. Nothing is read back to the host.

        balancing = LossFreeBalancing(model, rate=0.001)
        balancing.attach(optimizer)        # an update after every optimizer.step(); or call balancing() yourself

    Args:
        model: any module; its `Router`s built with correction_bias=True are found now.
        rate: the step; may be set later (DeepSeek-V3 ends with 0).
        group: sums the counts over the ranks of this process group, one collective per update.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model has no router with a correction bias.
    """

    def __init__(
        self, model: torch.nn.Module, *, rate: float = 0.001, group: torch.distributed.ProcessGroup | None = None
    ) -> None:
        op = "LossFreeBalancing"
        module_checks.instance(op, "model", model, (torch.nn.Module,), "a Module")
        module_checks.group(op, group)
        self.rate, self.group = checks.number(op, "rate", rate), group
        self.routers = [m for m in model.modules() if isinstance(m, Router) and m.selection_bias is not None]
        if not self.routers:
            raise ValueError(f"{op}: model must have a Router built with correction_bias=True, got none")
        self.counts = [self._zeros(router) for router in self.routers]
        self._hooks: list[Any] = [
            router.register_forward_hook(self._counter(place)) for place, router in enumerate(self.routers)
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Updates every bias by the counts since the last call, and forgets them."""
        if self.group is not None:
            together = torch.cat(self.counts)
            torch.distributed.all_reduce(together, group=self.group)
            self.counts = list(together.split([len(counts) for counts in self.counts]))
        for place, router in enumerate(self.routers):
            router.update_bias(self.counts[place], self.rate)
            self.counts[place] = self._zeros(router)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls this after every step of the optimizer; returns torch's handle, whose remove() ends that."""
        expected = "an Optimizer"
        module_checks.instance("LossFreeBalancing", "optimizer", optimizer, (torch.optim.Optimizer,), expected)
        return optimizer.register_step_post_hook(lambda *_: self())

    def remove(self) -> None:
        """Stops counting."""
        for hook in self._hooks:
            hook.remove()

    def _counter(self, place: int) -> Any:
        @torch.no_grad()
        def count(router: Router, _: Any, result: Any) -> None:
            if router.training and router is self.routers[place]:  # a copy of the model has a copy of the hook
                counts = ops.plan(result[1], router.num_experts).counts
                self.counts[place] = self.counts[place].to(counts.device) + counts

        return count

    @staticmethod
    def _zeros(router: Router) -> Tensor:
        return torch.zeros(router.num_experts, dtype=torch.int64, device=router.weight.device)
