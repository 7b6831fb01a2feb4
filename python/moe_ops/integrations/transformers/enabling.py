"""enable: the experts function "moe_ops", and routers if asked for."""

from __future__ import annotations

import functools
from typing import Any

import torch

from moe_ops import checks
from moe_ops.integrations.transformers import require, routers
from moe_ops.integrations.transformers.experts import experts_forward
from moe_ops.integrations.transformers.report import Report

NAME = "moe_ops"
_new_models: list[Report] = []  # the report on models built from now on, while their routers are to be replaced


def enable(model: Any = None, *, router: bool = False) -> Report:
    """Registers "moe_ops" among transformers' experts implementations.

    Afterwards `from_pretrained(..., experts_implementation="moe_ops")` and
    `model.set_experts_implementation("moe_ops")` work for every model that allows a choice. Models on other
    implementations are not touched.

    Args:
        model: switches this model to "moe_ops" as well.
        router: also lets moe_ops.route compute in the place of the routers it can say, in `model`, or without one in
            every model built after the call (False ends that). Where two experts tie, the lowest id is chosen.

    Returns:
        A Report: routers that were replaced and that were left alone. Without a model it is filled while models are
        built.

    Raises:
        ImportError: transformers is missing, or too old.
        TypeError: model is no PreTrainedModel, or router no bool.
        ValueError: the model does not allow a choice of experts: see `replace`.
    """
    op = "transformers.enable"
    checks.flag(op, "router", router)
    require.transformers(op)
    from transformers import PreTrainedModel
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    report = Report()
    if model is None:
        _new_models[:] = [report] if router else []
        if router:
            _watch(PreTrainedModel)
        return report
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{op}: model must be a PreTrainedModel, got {checks.kind(model)}")
    if not model._can_set_experts_implementation() and not _has_plugin(model):
        raise ValueError(
            f"{op}: {type(model).__name__} does not allow a choice of experts; replace(model) may serve it"
        )
    model.set_experts_implementation(NAME)
    if router:
        routers.replace_routers(model, report)
    return report


def _has_plugin(model: torch.nn.Module) -> bool:
    return any(hasattr(module, "_is_expert_parallel") for module in model.modules())


def _watch(model_class: Any) -> None:
    """Wraps post_init, which ends the __init__ of every model, once."""
    post_init = model_class.post_init
    if getattr(post_init, "watched_by_moe_ops", False):
        return

    @functools.wraps(post_init)
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        for report in _new_models:
            routers.replace_routers(self, report)

    watched.watched_by_moe_ops = True  # type: ignore[attr-defined]
    model_class.post_init = watched
