"""Cascade: the same experts several times in sequence, routed anew each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.nn.experts import Experts
from moe_ops.nn.router_base import RouterBase


class Cascade(torch.nn.Module):
    """Chain-of-Experts (Wang et al. 2025, arXiv:2506.18945): x_t = sum of weight · expert(x_{t-1}) + x_{t-1}.

    One set of experts is applied once per router, each to the result of the one before, so that later experts see what
    earlier ones made. x_0 is the input, and the last x_t the output.

    Args:
        experts: the experts of all steps.
        routers: one per step, each of experts.num_experts experts and experts.hidden; the same one twice shares it.
        residual: adds x_{t-1} in every step; without it, x_t is the experts' sum alone.
    """

    def __init__(self, experts: Experts, routers: Sequence[RouterBase], *, residual: bool = True) -> None:
        super().__init__()
        module_checks.instance("Cascade", "experts", experts, (Experts,), "an Experts")
        expected = "a sequence of routers"
        module_checks.instance("Cascade", "routers", routers, (Sequence, torch.nn.ModuleList), expected)
        if len(routers) == 0:
            raise ValueError("Cascade: routers must be at least 1, got 0")
        sizes = (experts.hidden, experts.num_experts)
        for router in routers:
            module_checks.instance("Cascade", "routers", router, (RouterBase,), expected)
            if (router.hidden, router.num_experts) != sizes:
                got = (router.hidden, router.num_experts)
                raise ValueError(f"Cascade: routers must have hidden, num_experts {sizes}, got {got}")
        checks.flag("Cascade", "residual", residual)
        self.experts, self.residual = experts, residual
        self.routers = torch.nn.ModuleList(routers)

    def forward(self, x: Tensor, *, return_route: bool = False, token_ids: Tensor | None = None) -> Any:
        """Applies the steps to x [..., hidden].

        Returns:
            y, of x's shape and dtype, or with return_route (y, the list of the steps' RouteResults).
        """
        module_checks.tokens("Cascade", x, self.experts.hidden)
        checks.flag("Cascade", "return_route", return_route)
        token_ids = module_checks.token_ids("Cascade", token_ids, x)
        y, routes = x.reshape(-1, self.experts.hidden), []
        for router in self.routers:
            routed = router(y, stats=return_route, token_ids=token_ids)
            weights, experts = routed[:2]
            step = self.experts(y, weights, experts, plan=router.plan(experts))  # type: ignore[operator]
            y = y + step if self.residual else step
            routes.append(routed)
        y = y.reshape(x.shape)
        return (y, routes) if return_route else y
