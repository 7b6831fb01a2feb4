"""Beginnings for routers and experts, drawn from torch's generator, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.expert_parallel.sharding import each_expert
from moe_ops.nn.experts import Experts
from moe_ops.nn.router_base import LinearRouter


@torch.no_grad()
def truncated_normal_(weight: Tensor, *, scale: float = 0.1) -> Tensor:
    """Normal of deviation sqrt(scale / fan-in), cut at two deviations; scale 0.1 made Switch stable (Fedus et al. 2022,
    section 2.4, against 1.0 of dense models).

    Args:
        weight: [..., fan_in], any float dtype: a router's weight, or w_in and w_out of `Experts`.
        scale: greater than 0.

    Returns:
        The weight.
    """
    op = "truncated_normal_"
    module_checks.instance(op, "weight", weight, (Tensor,), "a Tensor of shape [..., fan_in]")
    if weight.dim() == 0 or weight.shape[-1] == 0:
        raise ValueError(f"{op}: weight must be [..., fan_in] with fan_in of 1 or more, got shape {list(weight.shape)}")
    deviation = (checks.number(op, "scale", scale, positive=True) / weight.shape[-1]) ** 0.5
    for part in each_expert(weight) if weight.dim() > 2 else [weight]:
        torch.nn.init.trunc_normal_(part, 0.0, deviation, -2 * deviation, 2 * deviation)
    return weight


@torch.no_grad()
def even_(router: LinearRouter) -> LinearRouter:
    """Zeros for every parameter of the router that makes scores, so that all experts are alike at first and noise alone
    chooses (Shazeer et al. 2017, appendix A). Without noise or jitter every token would choose the lowest ids.
    """
    module_checks.instance("even_", "router", router, (LinearRouter,), "a LinearRouter")
    for name, parameter in router.named_parameters():
        if name != "expert_scale":
            parameter.zero_()
    return router


@torch.no_grad()
def upcycle_(experts: Experts, w_in: Tensor, w_out: Tensor, *, noise: float = 0.0) -> Experts:
    """Every expert becomes a copy of one dense feed-forward layer (Komatsuzaki et al. 2023, "Sparse Upcycling",
    arXiv:2212.05055); learned biases become zero.

    Args:
        experts: changed in place, and returned.
        w_in: [2 * inner or inner, hidden] in the experts' layout, any float dtype.
        w_out: [hidden, inner].
        noise: deviation of normal noise on each expert's copy, as a fraction of the weight's own deviation, so that
            experts differ where the router does not yet.
    """
    op = "upcycle_"
    module_checks.instance(op, "experts", experts, (Experts,), "an Experts")
    noise = checks.number(op, "noise", noise)
    for name, value in (("w_in", w_in), ("w_out", w_out)):
        target = getattr(experts, name)
        checks.floats(op, name, value, "[out, in]", 2)
        checks.shape(op, name, value, "[out, in]", tuple(target.shape[1:]))
        deviation = noise * value.float().std().item() if noise else 0.0
        for expert in each_expert(target):
            expert.copy_(value)
            if noise:
                expert.add_(torch.randn_like(expert), alpha=deviation)
    for bias in (experts.b_in, experts.b_out):
        if bias is not None:
            bias.zero_()
    return experts
