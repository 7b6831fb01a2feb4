"""The five verbs as functions: route, plan, permute, grouped_gemm, combine.

Each checks its arguments (checks.py), then calls one operator of torch.ops.moe_ops. They work under torch.compile,
torch.export, autocast and inference_mode. torch.vmap raises RuntimeError; so do torch.func.grad, jvp and their kin, as
torch does not offer them to operators whose gradient is registered in Python: use torch.autograd or Tensor.backward.

T tokens, E experts, K = top_k, R = T * K rows, H hidden. A float dtype is float32, bfloat16, float16 or float64.
"""

from typing import Literal, overload

import torch
from torch import Tensor

from moe_ops import autocast, autograd, checks, cuda, fakes, library, numerics, packing
from moe_ops.autograd import call
from moe_ops.packing import operand
from moe_ops.types import PackedWeight, Plan, RouteResult

library.load()
cuda.load()
fakes.register()
autograd.register()


@overload
def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = ...,
    selection_bias: Tensor | None = ...,
    groups: tuple[int, int] | None = ...,
    group_score: str = ...,
    group_mask: str = ...,
    renormalize: bool | str = ...,
    eps: float = ...,
    p: float = ...,
    scale: float = ...,
    expert_scale: Tensor | None = ...,
    softcap: float | None = ...,
    stats: Literal[False] = ...,
    segments: Tensor | None = ...,
    num_segments: int = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = ...,
    selection_bias: Tensor | None = ...,
    groups: tuple[int, int] | None = ...,
    group_score: str = ...,
    group_mask: str = ...,
    renormalize: bool | str = ...,
    eps: float = ...,
    p: float = ...,
    scale: float = ...,
    expert_scale: Tensor | None = ...,
    softcap: float | None = ...,
    stats: Literal[True],
    segments: Tensor | None = ...,
    num_segments: int = ...,
) -> RouteResult: ...
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
    """Chooses top_k experts for each token and weighs them.

    Computes in float32, or float64 for float64 logits, whatever autocast says. Choices come best first; ties go to the
    lowest id, NaN ranks highest, and the ids of a token are always distinct. Gradients flow to logits and expert_scale,
    never through the choice.

    Args:
        logits: [T, E], any float dtype.
        top_k: experts per token, 1 <= top_k <= E.
        score: "softmax" over all experts, "softmax_selected" over the chosen ones (GPT-OSS, Granite), "sigmoid"
            (DeepSeek-V3), "sqrtsoftplus" = sqrt(log(1 + exp(z))) (DeepSeek-V4) or "identity".
        selection_bias: [E], any float dtype: added to the scores for the choice alone (Wang et al. 2024,
            arXiv:2408.15664).
        groups: (num_groups, top_groups): experts are split in equal runs, and only those of the best runs can be chosen
            (DeepSeek-V2 and V3). The kept runs must hold at least top_k experts.
        group_score: a run's rank: "max" of its scores or "top2_sum", the sum of its two largest.
        group_mask: the score of experts outside the kept runs: "-inf" or "zero".
        renormalize: False; True: w / (sum w + eps); "clamp": w / max(sum w, eps); "pnorm": w / (sum |w|^p)^(1/p).
        eps: of renormalize.
        p: of renormalize "pnorm", greater than 0. This and every other number is finite.
        scale: factor of all weights, after renormalize.
        expert_scale: [E], any float dtype: factor of each expert's weight, after renormalize (Gemma 4).
        softcap: z = softcap * tanh(logit / softcap) takes the place of the logits.
        stats: also return what losses need.
        segments: [T] int32 or int64: the sequence of each token, for stats; values outside 0..num_segments-1 count
            nowhere.
        num_segments: S, the number of sequences.

    Returns:
        (weights [T, K], experts [T, K] int32); weights are float32, or float64 for float64 logits.
        With stats=True a RouteResult, which adds counts [S, E] int32 (slots per expert, before any drop), mean_prob
        [S, E] (mean of softmax(z), or of s / sum s for sigmoid and sqrtsoftplus) and logsumexp [T] of z.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value.
    """
    checks.no_tangents("route", logits, expert_scale)
    num_groups, top_groups = checks.groups(groups)
    checks.route(logits, top_k, selection_bias, num_groups, top_groups, expert_scale, segments, num_segments)
    score_number = checks.option("route", "score", score, checks.SCORES)
    group_score_number = checks.option("route", "group_score", group_score, checks.GROUP_SCORES)
    group_mask_number = checks.option("route", "group_mask", group_mask, checks.GROUP_MASKS)
    renormalize_number = checks.option("route", "renormalize", renormalize, checks.RENORMALIZE)
    compute = fakes.compute_dtype(logits.dtype)
    eps = checks.number("route", "eps", eps, dtype=compute)
    p = checks.number("route", "p", p, positive=True)
    scale = checks.number("route", "scale", scale, dtype=compute)
    cap = 0.0 if softcap is None else checks.number("route", "softcap", softcap, positive=True, dtype=compute)
    checks.flag("route", "stats", stats)
    if not torch.compiler.is_compiling():  # a bound on a traced size would become a guard
        checks.slots("route", "logits", logits.shape[0] * top_k)
    if selection_bias is not None:
        selection_bias = selection_bias.detach()
    if expert_scale is not None:
        expert_scale = expert_scale.to(compute)
    weights, experts, counts, mean_prob, logsumexp = call(
        torch.ops.moe_ops.route, logits, top_k, score_number, selection_bias, expert_scale, num_groups, top_groups,
        group_score_number, group_mask_number, renormalize_number, eps, p, scale, cap, stats, segments, num_segments,
    )  # fmt: skip
    return RouteResult(weights, experts, counts, mean_prob, logsumexp) if stats else (weights, experts)


def plan(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "position",
    weights: Tensor | None = None,
) -> Plan:
    """Sorts the slots (token, k) by expert, stably: where each row of the expert computation comes from and goes to.

    Ids outside 0..num_experts-1 are dropped slots. No host synchronisation; no gradient.

    Args:
        experts: [T, K] int32 or int64, as route returns them.
        num_experts: E >= 1.
        capacity: rows per expert at most; the rest are dropped. None: no limit.
        drop_policy: who stays when an expert is full: "position": earlier slots; "choice_first": all first choices
            before second ones (Lepikhin et al. 2020, arXiv:2006.16668); "probability": the highest weights, ties by
            position.
        weights: [T, K], any float dtype: read by "probability".

    Returns:
        Plan(offsets [E + 1], row_slot [R], slot_row [T, K], counts [E]), all int32; dropped slots sort behind
        offsets[E].

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value, or there are 2**31 slots.
    """
    policy = checks.option("plan", "drop_policy", drop_policy, checks.DROP_POLICIES)
    checks.plan("plan", experts, num_experts, capacity, policy, weights)
    if not torch.compiler.is_compiling():  # a bound on a traced size would become a guard
        checks.slots("plan", "experts", experts.numel())
    return Plan(*torch.ops.moe_ops.plan(experts, num_experts, capacity, policy, weights))


def permute(x: Tensor, plan: Plan) -> Tensor:
    """Copies each token to its rows: rows[r] = x[plan.row_token[r]], zeros for dropped slots.

    The gradient of x is combine without weights.

    Args:
        x: [T, H], any dtype of torch's stable ABI (not float8_e8m0fnu or float4); a float dtype where a gradient is
            needed.
        plan: of the same T tokens.

    Returns:
        [R, H], the dtype of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    checks.no_tangents("permute", x)
    checks.is_plan("permute", "plan", plan)
    checks.permute(x, plan.row_slot, plan.slot_row)
    rows: Tensor = call(torch.ops.moe_ops.permute, x, plan.row_slot, plan.slot_row)
    return rows


def grouped_gemm(
    a: Tensor, w: Tensor | PackedWeight, offsets: Tensor, *, bias: Tensor | None = None, gather: Plan | None = None
) -> Tensor:
    """Multiplies each expert's rows by its matrix: out[r] = a[r] @ w[e].T + bias[e]; zeros from offsets[E] on.

    Sums in float32 (float64 for float64). Float32 weights under bfloat16 or float16 rows are rounded to the rows'
    dtype, and their gradient is float32. Under autocast a goes to the autocast dtype. On CUDA float32 operands are
    rounded to TF32 where torch's switch allows it (torch.backends.cuda.matmul.fp32_precision or allow_tf32) and that is
    faster: not for 64 rows in all or fewer, nor where a row does not begin at a multiple of 16 bytes.

    Where w has an attribute `main_grad` (Megatron-LM's gradient buffer: float32, contiguous, of w's shape and device),
    backward adds the gradient of w to it and leaves w.grad alone. A traced program (torch.compile, torch.export) does
    not see the attribute and fills w.grad.

    Args:
        a: [R, K], any float dtype; with gather the tokens, [T, K].
        w: [E, N, K], dtype of a or float32 (see above). Any one unit stride is read in place. Or a PackedWeight in the
            dtype of a, where no gradient is needed (see prepack).
        offsets: [E + 1] int32, plan.offsets: the rows of expert e are offsets[e] .. offsets[e + 1]. Read as clamped to
            0..R and non-decreasing from 0.
        bias: [E, N], dtype of a or float32.
        gather: read row r from a[gather.row_token[r]], so that a permuted copy of the tokens is never stored.

    Returns:
        [R, N], the dtype of a.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: w is packed and a gradient is needed.
    """
    checks.no_tangents("grouped_gemm", a, w, bias)
    main_grad = None if torch.compiler.is_compiling() else getattr(w, "main_grad", None)
    a, w, bias = autocast.operands(a, w, bias)
    if gather is None:
        row_slot = slot_row = None
    else:
        checks.is_plan("grouped_gemm", "gather", gather)
        row_slot, slot_row = gather.row_slot, gather.slot_row
    weight, panels = operand(w)
    checks.grouped_gemm(a, weight, offsets, bias, row_slot, slot_row)
    packing.check("grouped_gemm", "w", weight, panels, "a", a)
    packing.no_gradient("grouped_gemm", "w", panels, a, bias)
    if main_grad is not None:
        checks.main_grad("grouped_gemm", main_grad, weight)
        weight.main_grad = main_grad  # a copy in the autocast dtype has lost it
    out: Tensor = call(
        torch.ops.moe_ops.grouped_gemm, a, weight, offsets, bias, row_slot, slot_row, panels, numerics.allow_tf32(a),
        numerics.is_batch_invariant(),
    )  # fmt: skip
    return out


def combine(rows: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """Sums each token's rows: y[t] = sum over k of weights[t, k] * rows[plan.slot_row[t, k]].

    Dropped slots count nothing. Sums in float32 (float64 for float64) in the order of k and rounds once.

    Args:
        rows: [R, H], any float dtype.
        weights: [T, K], any float dtype; None: a plain sum.
        plan: of the same R rows.

    Returns:
        [T, H], the dtype of rows.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    checks.no_tangents("combine", rows, weights)
    checks.is_plan("combine", "plan", plan)
    checks.combine(rows, weights, plan.row_slot, plan.slot_row)
    y: Tensor = call(torch.ops.moe_ops.combine, rows, weights, plan.row_slot, plan.slot_row)
    return y
