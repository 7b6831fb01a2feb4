"""replace: the models whose experts are no plug-in of transformers, changed in place, one layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_ops import checks
from moe_ops.integrations.transformers import choice, forwards, require, stacked
from moe_ops.integrations.transformers.report import Report

Forward = Callable[..., Any]
# Same parameters, another forward.
FORWARDS: dict[str, tuple[Forward, str]] = {
    "Llama4TextMoe": (forwards.llama4, "moe_mlp, weights on the input, in the place of all experts on all tokens"),
    "LongcatFlashExperts": (forwards.longcat, "moe_mlp, zero experts as a factor of the token"),
    "JetMoeMoE": (forwards.jetmoe, "route and moe_mlp"),
    "Step3p7Experts": (forwards.step3p7, "moe_mlp, or two products where the gate is clamped after silu"),
}
# A new module: one tensor of all experts' weights.
STACKED: dict[str, tuple[Callable[[Any], stacked.Stacked], str]] = {
    "DbrxExperts": (stacked.Dbrx, "moe_mlp on w1 and v1 in one tensor"),
    "SwitchTransformersExperts": (stacked.Switch, "moe_mlp on stacked weights"),
    "NllbMoeExperts": (stacked.Nllb, "moe_mlp on stacked weights, with the ids that transformers gives (0 and 1 only)"),
}


def replace(model: torch.nn.Module) -> Report:
    """Swaps the experts of models that are no plug-in: DBRX, Llama 4, Switch, LongCat, JetMoE, NLLB, Step-3.

    Llama 4, LongCat, JetMoE and Step-3 keep their parameters and their names. The experts of DBRX, Switch and NLLB
    become new parameters w_in [E, 2I or I, H] and w_out, taken over one layer at a time: call it after loading and
    before an optimizer is made, and save the state of the model before.

    Args:
        model: the loaded model. It is changed.

    Returns:
        A Report of every expert module: what computes in its place, or why it was left alone.

    Raises:
        ImportError: transformers is missing, or too old.
        TypeError: model is no torch.nn.Module.
    """
    op = "transformers.replace"
    require.transformers(op)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {checks.kind(model)}")
    report = Report()
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        kind = type(module).__name__
        if choice.LISTENERS in vars(module):
            report.left[name] = "was replaced before"
        elif hasattr(module, "_is_expert_parallel"):
            report.left[name] = "is a plug-in: model.set_experts_implementation('moe_ops') after enable()"
        elif kind in FORWARDS or kind in STACKED:
            reason = _unfit(module) if name or kind in FORWARDS else "is not inside a model"
            if reason:
                report.left[name] = reason
            elif kind in FORWARDS:
                forward, what = FORWARDS[kind]
                module.forward = functools.partial(forward, module)  # a bound method would not unpickle
                setattr(module, choice.LISTENERS, [])
                report.replaced[name] = what
            else:
                swap, what = STACKED[kind]
                model.set_submodule(name, swap(module))
                report.replaced[name] = what
        elif kind == "JetMoeMoA":
            report.left[name] = "its experts are projections of attention, with other kernels between them"
    return report


def _unfit(module: Any) -> str:
    """Why a module's weights cannot be taken as they are; "" where they can."""
    values = list(module.parameters())
    if any(value.device.type == "meta" for value in values):
        return "its weights are not loaded (device meta)"
    if not values or any(value.dtype not in checks.FLOATS for value in values):
        return "its weights are quantised"
    if any("lora" in name.lower() for name, _ in module.named_parameters()):
        return "it holds LoRA adapters"
    return ""
