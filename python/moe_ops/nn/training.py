"""What keeps routers stable while they train: parameter groups, smoothed gradients, warm-up of top_k and capacity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.nn.moe import MoE
from moe_ops.nn.router_base import RouterBase


def router_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters of all routers in the model, each once."""
    module_checks.instance("router_parameters", "model", model, (torch.nn.Module,), "a Module")
    routers = [module for module in model.modules() if isinstance(module, RouterBase)]
    return list(dict.fromkeys(parameter for router in routers for parameter in router.parameters()))


def parameter_groups(model: torch.nn.Module, router: Mapping[str, Any], **others: Any) -> list[dict[str, Any]]:
    """An optimizer's parameter groups that give routers their own options.

        torch.optim.AdamW(parameter_groups(model, {"lr": 1e-4, "weight_decay": 0.0}, lr=3e-4))

    Args:
        model: any module with routers.
        router: options of the routers' group: a smaller learning rate, no decay.
        others: options of the other parameters' group.

    Returns:
        [group of the others, group of the routers], for parameters that require a gradient.
    """
    op = "parameter_groups"
    module_checks.instance(op, "router", router, (Mapping,), "a mapping of options")
    ours = router_parameters(model)
    if not ours:
        raise ValueError(f"{op}: model must have a router with parameters, got none")
    known = set(ours)
    rest = [parameter for parameter in model.parameters() if parameter not in known and parameter.requires_grad]
    mine = [parameter for parameter in ours if parameter.requires_grad]
    return [{"params": rest, **others}, {"params": mine, **router}]


class GradientSmoothing:
    """Replaces gradients by their exponential moving average before every step of an optimizer.

    The average is corrected for its start: m = decay · m + (1 - decay) · grad, grad = m / (1 - decay^steps), the first
    moment of Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1). Which experts a token reaches changes from batch
    to batch, and a router's gradient with it; smoothed, it moves with what many batches agree on, in optimizers without
    momentum, or where routers should have more of it than the rest.

        GradientSmoothing(router_parameters(model), decay=0.9).attach(optimizer)

    Args:
        parameters: whose gradients are smoothed. One without a gradient is left alone in that step.
        decay: in [0, 1); 0 changes nothing.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], *, decay: float = 0.9) -> None:
        op = "GradientSmoothing"
        module_checks.instance(op, "parameters", parameters, (Iterable,), "an iterable of parameters")
        self.parameters = list(parameters)
        for parameter in self.parameters:
            module_checks.instance(op, "parameters", parameter, (Tensor,), "an iterable of parameters")
        if not 0 <= checks.number(op, "decay", decay) < 1:
            raise ValueError(f"{op}: decay must be in [0, 1), got {decay}")
        self.decay = decay
        self.steps = [0] * len(self.parameters)
        self.averages: list[Tensor | None] = [None] * len(self.parameters)

    @torch.no_grad()
    def __call__(self) -> None:
        """Smooths the gradients that are there now."""
        for place, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            dtype = torch.promote_types(parameter.grad.dtype, torch.float32)
            average = self.averages[place]
            if average is None:
                average = self.averages[place] = torch.zeros_like(parameter.grad, dtype=dtype)
            average.lerp_(parameter.grad.to(dtype), 1 - self.decay)
            self.steps[place] += 1
            parameter.grad.copy_(average / (1 - self.decay ** self.steps[place]))

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls this before every step of the optimizer; returns torch's handle, whose remove() ends that."""
        expected = "an Optimizer"
        module_checks.instance("GradientSmoothing", "optimizer", optimizer, (torch.optim.Optimizer,), expected)
        return optimizer.register_step_pre_hook(lambda *_: self())

    def state_dict(self) -> dict[str, Any]:
        """Averages and step counts, in the order of the parameters."""
        return {"averages": list(self.averages), "steps": list(self.steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("averages", "steps"):
            if len(state[name]) != len(self.parameters):
                expected, got = len(self.parameters), len(state[name])
                raise ValueError(f"GradientSmoothing: state must have {expected} {name}, got {got}")
        pairs = zip(state["averages"], self.parameters)
        self.averages = [None if average is None else average.to(p.device, copy=True) for average, p in pairs]
        self.steps = list(state["steps"])


class WarmUp:
    """Moves a layer's top_k, capacity factor or both from a first value to a last one, a little every step.

    Dense first, sparse later: all experts learn before the router chooses (Nie et al. 2021, "EvoMoE", the
    dense-to-sparse gate, arXiv:2112.14397). A large capacity first lets an unbalanced router drop nothing.

        WarmUp(model.moe, steps=1000, top_k=(8, 2), capacity_factor=(4.0, 1.25)).attach(optimizer)

    Args:
        layer: its values are set to the first ones now.
        steps: how many until the last values hold; in between they are linear in the step, top_k rounded.
        top_k, capacity_factor: (first, last), or None to leave it alone.
    """

    def __init__(
        self,
        layer: MoE,
        steps: int,
        *,
        top_k: tuple[int, int] | None = None,
        capacity_factor: tuple[float, float] | None = None,
    ) -> None:
        module_checks.instance("WarmUp", "layer", layer, (MoE,), "an MoE")
        module_checks.sizes("WarmUp", steps=steps)
        if top_k is None and capacity_factor is None:
            raise ValueError("WarmUp: top_k or capacity_factor must be given, got None for both")
        if top_k is not None:
            module_checks.pair("WarmUp", "top_k", top_k, "(first, last)")
            module_checks.sizes("WarmUp", **{"top_k": min(top_k)})
            layer.router.set_top_k(max(top_k))  # refuses what the router cannot do
        if capacity_factor is not None:
            module_checks.pair("WarmUp", "capacity_factor", capacity_factor, "(first, last)")
            for factor in capacity_factor:
                checks.number("WarmUp", "capacity_factor", factor, positive=True)
        self.layer, self.steps, self.top_k, self.capacity_factor = layer, steps, top_k, capacity_factor
        self.step = 0
        self._apply()

    def __call__(self) -> None:
        """One step on."""
        self.step += 1
        self._apply()

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls this after every step of the optimizer; returns torch's handle, whose remove() ends that."""
        module_checks.instance("WarmUp", "optimizer", optimizer, (torch.optim.Optimizer,), "an Optimizer")
        return optimizer.register_step_post_hook(lambda *_: self())

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.step = state["step"]
        self._apply()

    def _apply(self) -> None:
        done = min(self.step / self.steps, 1.0)
        if self.top_k is not None:
            first, last = self.top_k
            self.layer.router.set_top_k(round(first + (last - first) * done))
        if self.capacity_factor is not None:
            start, end = self.capacity_factor
            self.layer.capacity_factor = end if done == 1.0 else start + (end - start) * done
