"""The operators in plain PyTorch: their specification, on any device, in any dtype, differentiated by autograd.

In float64 this is the oracle of the tests; in another dtype it is what an ordinary PyTorch user would write in it.
Arguments are not checked. Signatures, shapes and dtypes are those of the operators of the same name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .types import Plan, RouteResult

# ---- route ----------------------------------------------------------------------------------------------------------


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    selection_bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    group_score: str = "top2_sum",
    group_mask: str = "-inf",
    renormalize: bool | str = False,
    eps: float = 1e-20,
    p: float = 1.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    softcap: float | None = None,
    stats: bool = False,
    segments: Tensor | None = None,
    num_segments: int = 1,
) -> tuple[Tensor, Tensor] | RouteResult:
    """Choose top_k experts per token and weigh them; always in float32 (float64 for float64 logits)."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    groups = None if groups == (1, 1) else groups  # one group says nothing
    logits = logits.to(dtype)  # [T, E]
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    s = _scores(z, score)

    with torch.no_grad():
        if selection_bias is None and groups is None:
            choice = logits  # every score rises with the logit, so the logits themselves are compared, exactly
        else:
            choice = s if selection_bias is None else s + selection_bias.to(dtype)
        if groups is not None:
            choice = _mask_groups(choice, groups, group_score, group_mask)
        experts = _rank(choice)[:, :top_k]  # [T, K]

    weights = weigh(
        logits, experts, score=score, renormalize=renormalize, eps=eps, p=p, scale=scale, expert_scale=expert_scale,
        softcap=softcap,
    )  # fmt: skip
    if not stats:
        return weights, experts.int()

    prob = s / s.sum(1, keepdim=True) if score in ("sigmoid", "sqrtsoftplus") else torch.softmax(z, dim=1)
    counts, mean_prob = _segment_stats(prob, experts, segments, num_segments)
    return RouteResult(weights, experts.int(), counts, mean_prob, torch.logsumexp(z, dim=1))


def weigh(
    logits: Tensor,
    experts: Tensor,
    *,
    score: str = "softmax",
    renormalize: bool | str = False,
    eps: float = 1e-20,
    p: float = 1.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[T, K], the weights of experts [T, K] that were chosen before, whoever chose them; route's options."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits, experts = logits.to(dtype), experts.long()
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    if score == "softmax_selected":
        weights = torch.softmax(z.gather(1, experts), dim=1)
    else:
        weights = _scores(z, score).gather(1, experts)
    weights = _renormalize(weights, renormalize, eps, p) * scale
    return weights if expert_scale is None else weights * expert_scale.to(dtype)[experts]


def _scores(z: Tensor, score: str) -> Tensor:
    """[T, E], the score of every expert; softmax_selected chooses by z and scores the chosen only."""
    if score == "softmax":
        return torch.softmax(z, dim=1)
    if score == "sigmoid":
        return torch.sigmoid(z)
    if score == "sqrtsoftplus":
        return torch.logaddexp(z, torch.zeros_like(z)).sqrt()
    assert score in ("identity", "softmax_selected"), score
    return z


def _rank(choice: Tensor) -> Tensor:
    """[T, E], column ids from the best choice to the worst: NaN first, then by value, ties by id; -0.0 equals 0.0."""
    key = torch.where(choice.isnan(), torch.nan, choice + 0.0)  # one NaN, one zero
    return torch.sort(key, dim=1, descending=True, stable=True).indices


def _mask_groups(choice: Tensor, groups: tuple[int, int], group_score: str, group_mask: str) -> Tensor:
    """choice [T, E] with the experts outside the top_groups best of num_groups equal runs put to -inf or 0."""
    num_groups, top_groups = groups
    by_group = choice.unflatten(1, (num_groups, choice.shape[1] // num_groups))  # [T, G, E / G]
    best = torch.sort(by_group, dim=2, descending=True).values
    of_group = best[:, :, 0] if group_score == "max" else best[:, :, :2].sum(2)  # [T, G]
    kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, _rank(of_group)[:, :top_groups], True)
    outside = -torch.inf if group_mask == "-inf" else 0.0
    return torch.where(kept.unsqueeze(2), by_group, outside).flatten(1)


def _renormalize(weights: Tensor, renormalize: bool | str, eps: float, p: float) -> Tensor:
    if renormalize is False:
        return weights
    if renormalize is True:
        return weights / (weights.sum(1, keepdim=True) + eps)
    if renormalize == "clamp":
        total = weights.sum(1, keepdim=True)
        return weights / torch.where(total < eps, eps, total)
    assert renormalize == "pnorm", renormalize
    return weights / torch.linalg.vector_norm(weights, ord=p, dim=1, keepdim=True)


def _segment_stats(prob: Tensor, experts: Tensor, segments: Tensor | None, num_segments: int) -> tuple[Tensor, Tensor]:
    """Slots per expert, int32, and the mean of prob over the tokens, both [S, E]; other segments count nowhere."""
    tokens = prob.shape[0]
    if segments is None:
        segments = torch.zeros(tokens, dtype=torch.long, device=prob.device)
    member = segments.long().unsqueeze(0) == torch.arange(num_segments, device=prob.device).unsqueeze(1)  # [S, T]
    chosen = torch.zeros_like(prob, dtype=torch.bool).scatter_(1, experts, True)  # [T, E]
    counts = torch.stack([chosen[m].sum(0) for m in member]).int()
    mean_prob = torch.stack([prob[m].sum(0) / m.sum().clamp(min=1) for m in member])
    return counts, mean_prob


# ---- plan -----------------------------------------------------------------------------------------------------------


def plan(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    weights: Tensor | None = None,
) -> Plan:
    """Sort the slots by expert, stably; ids outside 0..E-1 and slots over capacity are dropped."""
    tokens, top_k = experts.shape
    ids = experts.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)  # dropped slots sort last
    if capacity is not None:
        best_first = _priority(tokens, top_k, drop_policy, weights, ids.device)  # slots
        best_first = best_first[ids[best_first].argsort(stable=True)]  # by expert, the best of each first
        sorted_ids = ids[best_first]
        first = torch.searchsorted(sorted_ids, sorted_ids)  # where the expert of each begins
        place = torch.arange(len(ids), device=ids.device) - first
        ids[best_first[place >= capacity]] = num_experts

    row_slot = ids.argsort(stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    offsets = F.pad(counts.cumsum(0), (1, 0))
    slot_row = torch.empty_like(row_slot)
    slot_row[row_slot] = torch.arange(len(ids), device=ids.device)
    slot_row[ids == num_experts] = -1
    return Plan(offsets.int(), row_slot.int(), slot_row.view(tokens, top_k).int(), counts.int())


def _priority(tokens: int, top_k: int, drop_policy: str, weights: Tensor | None, device: torch.device) -> Tensor:
    """The slots in the order in which they are given their places."""
    slots = torch.arange(tokens * top_k, device=device)
    if drop_policy == "position":
        return slots
    if drop_policy == "choice_first":
        return slots.view(tokens, top_k).t().reshape(-1)
    assert drop_policy == "probability" and weights is not None, drop_policy
    return _rank(weights.detach().reshape(1, -1))[0]


# ---- permute, grouped_gemm, combine ---------------------------------------------------------------------------------


def permute(x: Tensor, plan: Plan) -> Tensor:
    """[R, H]: each row's token; zeros for the rows of dropped slots."""
    rows = torch.arange(len(plan.row_slot), device=x.device)
    kept = plan.slot_row.reshape(-1)[plan.row_slot.long()] == rows
    return torch.where(kept.unsqueeze(1), x[plan.row_token.long()], torch.zeros((), dtype=x.dtype, device=x.device))


def grouped_gemm(
    a: Tensor, w: Tensor, offsets: Tensor, *, bias: Tensor | None = None, gather: Plan | None = None
) -> Tensor:
    """[R, N]: a[r] @ w[e].T + bias[e] for the rows r of expert e, zeros from offsets[E] on.

    w [E, N, K] and bias [E, N] are rounded to a's dtype.
    """
    if gather is not None:
        a = a[gather.row_token.long()]
    num_rows = len(a)
    bounds = [0]
    for bound in offsets[1:].tolist():  # offsets are read as clamped and non-decreasing, from 0
        bounds.append(max(bounds[-1], min(bound, num_rows)))
    matrices = w.to(a.dtype).unbind(0)
    biases = [None] * len(matrices) if bias is None else bias.to(a.dtype).unbind(0)
    used = [e for e in range(len(w)) if bounds[e] < bounds[e + 1]] or range(
        min(len(w), 1)
    )  # one at least, for autograd
    out = [F.linear(a[bounds[e] : bounds[e + 1]], matrices[e], biases[e]) for e in used]
    return torch.cat([*out, a.new_zeros(num_rows - bounds[-1], w.shape[1])])


def combine(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """[T, H]: the sum over k of weights[t, k] * rows[slot_row[t, k]], in rows' dtype; dropped slots are skipped."""
    kept = (plan.slot_row >= 0) & (plan.slot_row < len(rows))  # [T, K]
    if len(rows) == 0:
        return rows.new_zeros(len(kept), rows.shape[1]) + 0 * rows.sum()
    parts = torch.where(kept.unsqueeze(2), rows[plan.slot_row.clamp(0, len(rows) - 1).long()], 0)  # [T, K, H]
    if weights is not None:
        parts = parts * torch.where(kept, weights, 0).unsqueeze(2)
    return parts.sum(1).to(rows.dtype)


# ---- composites -----------------------------------------------------------------------------------------------------


def dispatch(
    x: Tensor,
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    weights: Tensor | None = None,
    group: None = None,
) -> tuple[Tensor, Plan]:
    """plan, then permute: the rows in expert order, and the plan that combine takes back."""
    to_experts = plan(experts, num_experts, capacity=capacity, drop_policy=drop_policy, weights=weights)
    return permute(x, to_experts), to_experts


def activate(
    pre: Tensor,
    activation: str = "silu",
    gated: bool = True,
    layout: str = "concatenated",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """[R, I]: act(gate) * (up + up_offset) of pre [R, 2I], or act(pre) of pre [R, I].

    limit clamps gates from above and ups from both sides; act is silu (z * sigmoid(alpha * z)), gelu, gelu_tanh, relu
    or relu2 (relu squared).
    """
    if not gated:
        gate, up = pre, None
    elif layout == "interleaved":
        gate, up = pre[:, 0::2], pre[:, 1::2]
    else:
        gate, up = pre.chunk(2, dim=1)
    if limit is not None:
        # Not clamp: whether its gradient passes at the limit itself depends on the version of torch. Here it does.
        gate = torch.where(gate > limit, limit, gate)
        up = None if up is None else torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
    if activation == "silu":
        inner = gate * torch.sigmoid(alpha * gate)
    elif activation == "gelu":
        inner = F.gelu(gate)
    elif activation == "gelu_tanh":
        inner = F.gelu(gate, approximate="tanh")
    else:
        assert activation in ("relu", "relu2"), activation
        inner = F.relu(gate).square() if activation == "relu2" else F.relu(gate)
    return inner if up is None else inner * (up + up_offset if up_offset else up)


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    experts: Tensor | None,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    layout: str = "concatenated",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
    weight_on: str = "output",
    capacity: int | None = None,
    drop_policy: str = "position",
    plan: Plan | None = None,
) -> Tensor:
    """[T, H]: the weighted sum of the chosen experts' feed-forward layers. A given plan supersedes experts."""
    if plan is None:
        assert experts is not None
        rows, plan = dispatch(
            x, experts, len(w_in), capacity=capacity, drop_policy=drop_policy, weights=weights
        )  # [R, H]
    else:
        rows = permute(x, plan)
    if weight_on == "input":
        rows = (rows * weights.reshape(-1)[plan.row_slot.long()].unsqueeze(1)).to(x.dtype)
    pre = grouped_gemm(rows, w_in, plan.offsets, bias=b_in)  # [R, 2I or I]
    inner = activate(pre, activation, gated, layout, alpha, limit, up_offset)  # [R, I]
    out = grouped_gemm(inner, w_out, plan.offsets, bias=b_out)  # [R, H]
    return combine(out, weights if weight_on == "output" else None, plan)
