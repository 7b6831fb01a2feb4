"""What a training loss adds to keep experts in use and logits small, from the statistics that route returns."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.types import NoisyRouteResult, RouteResult


def load_balancing(
    route: RouteResult | NoisyRouteResult | tuple[Tensor, Tensor],
    *,
    alpha: float = 1.0,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """alpha · E · sum over experts of f·P (Fedus et al. 2022, "Switch Transformers", equations 4 to 6).

    f is the share of the slots routed to an expert and P its mean probability, so a perfectly even load gives alpha for
    any top_k. transformers divides the counts by tokens instead of slots: its loss is top_k times this one.

    Args:
        route: a RouteResult, or the pair (counts [segments, experts] integer, mean_prob [segments, experts]), for
            instance counts summed over several ranks. One segment gives the loss over the whole batch; with more the
            loss is their mean (per sequence), those without tokens left out.
        alpha: the factor of the loss.
        group: sums the counts over the ranks of this process group, so that the loss is that of the global batch (Qiu
            et al. 2025, "Demons in the Detail", arXiv:2501.11873). P stays the rank's own: averaged over the ranks, as
            data parallelism averages gradients, loss and gradient are those of one rank with all the tokens, if all
            have as many. One segment only; every rank of the group must call.

    Returns:
        A scalar in mean_prob's dtype, 0 without tokens. Gradients flow through mean_prob only: f is constant.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    op = "load_balancing"
    counts, mean_prob = module_checks.load(op, route)
    alpha = checks.number(op, "alpha", alpha)
    module_checks.group(op, group)
    if group is not None:
        if counts.shape[0] != 1:
            raise ValueError(f"{op}: group must be None with more than one segment, got {counts.shape[0]} segments")
        counts = counts.clone()
        torch.distributed.all_reduce(counts, group=group)
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


def importance(weights: Tensor, experts: Tensor, num_experts: int, *, weight: float = 1.0) -> Tensor:
    """weight · CV², the squared coefficient of variation of the experts' sums of route weights (Shazeer et al. 2017,
    "Outrageously Large Neural Networks", equations 6 and 7).

    Args:
        weights, experts: [tokens, k], as a router returns them: distinct ids in a row; ids outside 0..num_experts-1
            count nowhere.
        num_experts: how many experts there are.
        weight: the factor of the loss; the paper uses 0.1.

    Returns:
        A scalar in weights' dtype, 0 without tokens. CV² = variance / mean², the variance over all experts (not the
        unbiased estimate).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    op = "importance"
    checks.floats(op, "weights", weights, "[tokens, k]", 2)
    checks.ids(op, "experts", experts, "[tokens, k]", 2)
    checks.shape(op, "experts", experts, "[tokens, k]", tuple(weights.shape))
    checks.same_device(op, "experts", experts, "weights", weights)
    checks.integer(op, "num_experts", num_experts, 1, checks.MAX_INT32 - 1)
    known = (experts >= 0) & (experts < num_experts)
    columns = torch.where(known, experts, num_experts).long()  # the last is thrown away
    gates = weights.new_zeros(weights.shape[0], num_experts + 1).scatter(1, columns, torch.where(known, weights, 0))
    return checks.number(op, "weight", weight) * _variation(gates[:, :num_experts].sum(0))


def load(load: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight · CV² of the smooth load (Shazeer et al. 2017, equation 11); see importance for CV².

    Args:
        load: [experts], from a NoisyRouteResult. Counts would have no gradient.
        weight: the factor of the loss; the paper uses 0.1.

    Returns:
        A scalar in load's dtype, 0 without tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    checks.floats("load", "load", load, "[experts]", 1)
    return checks.number("load", "weight", weight) * _variation(load)


def local_entropy(logits: Tensor, *, weight: float = 1.0) -> Tensor:
    """weight · mean over tokens of the entropy of softmax(logits), in nats: small where tokens are sure of experts
    (Mustafa et al. 2022, "LIMoE", arXiv:2206.02770, the local loss).

    Args:
        logits: [tokens, experts], as `LinearRouter.logits` gives them.
        weight: the factor of the loss.

    Returns:
        A scalar, float32 (float64 for float64 logits), 0 without tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    checks.floats("local_entropy", "logits", logits, "[tokens, experts]", 2)
    weight = checks.number("local_entropy", "weight", weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return weight * _entropy(logits.softmax(1)) / max(logits.shape[0], 1)


def global_entropy(mean_prob: Tensor, *, weight: float = 1.0) -> Tensor:
    """-weight · entropy of the mean probabilities, in nats: small where the load is spread over the experts (Mustafa et
    al. 2022, "LIMoE", the global loss). At its least, an even load, it is -weight · log(experts).

    Args:
        mean_prob: [segments, experts], from a RouteResult; with several segments the mean of their losses, those
            without tokens left out.
        weight: the factor of the loss.

    Returns:
        A scalar in mean_prob's dtype, 0 without tokens.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    checks.floats("global_entropy", "mean_prob", mean_prob, "[segments, experts]", 2)
    weight = checks.number("global_entropy", "weight", weight)
    used = (mean_prob.sum(1) > 0).sum().clamp(min=1)
    return -weight * _entropy(mean_prob) / used


def _entropy(p: Tensor) -> Tensor:
    """The sum of -p · log(p). Where p has come to 0 its slope is large, not infinite: softmax's is 0 there, and 0 · inf
    would be NaN."""
    return -(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()


def _variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation of values [experts], 0 where all are 0."""
    mean = values.mean()
    square = mean * mean
    return (values - mean).square().mean() / torch.where(square > 0, square, 1)
