"""RouterHealth in transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_ops.monitor.health import RouterHealth


def figures(health: RouterHealth) -> dict[str, float]:
    """Two figures of the worst layer, the share of dead experts, and that of dropped slots, a mean over the layers."""
    summaries = list(health.summary().values())
    if not summaries:
        return {}
    experts = sum(len(s.load) for s in summaries)
    return {
        "router/max_over_mean": max(s.max_over_mean for s in summaries),
        "router/entropy": min(s.entropy for s in summaries),
        "router/dead_experts": sum(s.dead for s in summaries) / experts,
        "router/dropped": sum(s.dropped for s in summaries) / len(summaries),
    }


def callback(health: RouterHealth, report: Callable[[dict[str, float]], None] | None) -> Any:
    try:
        from transformers import TrainerCallback
    except ModuleNotFoundError:
        raise ImportError("RouterHealth.trainer_callback: needs transformers: pip install transformers") from None

    class HealthCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            health.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            values = figures(health)
            if logs is not None:
                logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)
            if report is not None and values:
                report(values)
            health.reset()

    return HealthCallback()
