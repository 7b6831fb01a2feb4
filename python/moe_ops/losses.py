"""What a training loss adds to keep experts in use and logits small, from the statistics that route returns."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.types import RouteResult


def load_balancing(route: RouteResult | tuple[Tensor, Tensor], *, alpha: float = 1.0) -> Tensor:
    """alpha · E · sum over experts of f·P (Fedus et al. 2022, "Switch Transformers", equations 4 to 6).

    f is the share of the slots routed to an expert and P its mean probability, so a perfectly even load gives alpha for
    any top_k. transformers divides the counts by tokens instead of slots: its loss is top_k times this one.

    Args:
        route: a RouteResult, or the pair (counts [segments, experts] integer, mean_prob [segments, experts]), for
            instance counts summed over several ranks. One segment gives the loss over the whole batch; with more the
            loss is their mean (per sequence), those without tokens left out.
        alpha: the factor of the loss.

    Returns:
        A scalar in mean_prob's dtype, 0 without tokens. Gradients flow through mean_prob only: f is constant.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    op = "load_balancing"
    counts, mean_prob = module_checks.load(op, route)
    alpha = checks.number(op, "alpha", alpha)
    slots = counts.sum(1, keepdim=True)  # [segments, 1]
    share = counts.to(mean_prob.dtype) / slots.clamp(min=1)
    used = (slots > 0).sum().clamp(min=1)
    return alpha * counts.shape[1] * (share * mean_prob).sum() / used


def z_loss(logsumexp: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight · mean over tokens of logsumexp², which keeps logits small (Zoph et al. 2022, "ST-MoE", equation 5).

    Args:
        logsumexp: [tokens], from a RouteResult. Padding is left out by indexing before the call.
        weight: the factor of the loss; the paper uses 0.001.

    Returns:
        A scalar in logsumexp's dtype, 0 without tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    checks.floats("z_loss", "logsumexp", logsumexp, "[tokens]", 1)
    weight = checks.number("z_loss", "weight", weight)
    return weight * torch.square(logsumexp).sum() / max(logsumexp.numel(), 1)
