"""What a caller can get wrong, checked once: operators' wrappers and fakes call the same functions.

Texts name the operator, the argument, what was expected and what came. Nothing here reads a tensor's values or waits
for a device, and sizes are only compared, so every check can be traced.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_ops.types import Plan

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What permute copies beside them: what torch's stable ABI has.
COPIED = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32}
COPIED |= {torch.int64, torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e4m3fnuz}
COPIED |= {torch.float8_e5m2, torch.float8_e5m2fnuz}

# Names of options and their numbers in the schemas: the enumerators of csrc/stages/params.h, in its order.
SCORES = {"softmax": 0, "softmax_selected": 1, "sigmoid": 2, "sqrtsoftplus": 3, "identity": 4}
GROUP_SCORES = {"max": 0, "top2_sum": 1}
GROUP_MASKS = {"-inf": 0, "zero": 1}
RENORMALIZE = {False: 0, True: 1, "clamp": 2, "pnorm": 3}
DROP_POLICIES = {"position": 0, "choice_first": 1, "probability": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4}
LAYOUTS = {"concatenated": 0, "interleaved": 1}
WEIGHT_ON = {"output": 0, "input": 1}

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1


def option(op: str, name: str, value: Any, table: dict[Any, int]) -> int:
    """The number of an option given by name."""
    if not isinstance(value, (str, bool)):
        raise TypeError(f"{op}: {name} must be {_one_of(table)}, got {kind(value)}")
    if value not in table:
        raise ValueError(f"{op}: {name} must be {_one_of(table)}, got {value!r}")
    return table[value]


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {kind(value)}")


def number(op: str, name: str, value: Any, *, positive: bool = False, dtype: torch.dtype = torch.float64) -> float:
    """A float option that is finite in the dtype it is used in, and above 0 there if positive."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {kind(value)}")
    bounds = torch.finfo(dtype)
    if positive and not value >= bounds.tiny:
        where = "" if value <= 0 else f" in {name_of(dtype)}"
        raise ValueError(f"{op}: {name} must be greater than 0{where}, got {value}")
    if not -bounds.max <= value <= bounds.max:  # not isfinite, which cannot be traced on a symbolic float
        raise ValueError(f"{op}: {name} must be a finite {name_of(dtype)}, got {_brief(value)}")
    return float(value)


def integer(op: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    _is_integer(op, name, value)
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    if most is not None and isinstance(value, int) and value > most:
        raise ValueError(f"{op}: {name} must be at most {most}, got {_brief(value)}")


def tensor(op: str, name: str, value: Any, layout: str, dim: int) -> None:
    """A tensor of so many dimensions; layout names them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor of shape {layout}, got {kind(value)}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense Tensor, got one of layout {name_of(value.layout)}")
    if value.dim() != dim:
        raise ValueError(f"{op}: {name} must be of shape {layout}, got {list(value.shape)}")


def floats(op: str, name: str, value: Any, layout: str, dim: int) -> None:
    tensor(op, name, value, layout, dim)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be of dtype float32, bfloat16, float16 or float64, got {name_of(value.dtype)}"
        )


def ids(op: str, name: str, value: Any, layout: str, dim: int) -> None:
    tensor(op, name, value, layout, dim)
    if value.dtype != torch.int32 and value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be of dtype int32 or int64, got {name_of(value.dtype)}")


def index(op: str, name: str, value: Any, layout: str, dim: int) -> None:
    """A tensor of a plan."""
    tensor(op, name, value, layout, dim)
    if value.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be of dtype int32, as plan returns it, got {name_of(value.dtype)}")


def same_device(op: str, name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    if value.device != first.device:
        raise ValueError(f"{op}: {name} must be on the device of {first_name} ({first.device}), got {value.device}")


def shape(op: str, name: str, value: Tensor, layout: str, expected: tuple[int, ...]) -> None:
    if value.shape != expected:
        raise ValueError(f"{op}: {name} must be of shape {layout} = {list(expected)}, got {list(value.shape)}")


def expert_dtype(op: str, name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    """Expert weights and biases have the dtype of the tokens, or float32 under bfloat16 and float16 tokens."""
    if value.dtype != first.dtype and (value.dtype != torch.float32 or first.dtype == torch.float64):
        allowed = "" if first.dtype in (torch.float32, torch.float64) else " or float32"
        expected = f"the dtype of {first_name} ({name_of(first.dtype)}){allowed}"
        raise TypeError(f"{op}: {name} must have {expected}, got {name_of(value.dtype)}")


def no_tangents(op: str, *values: Any) -> None:
    """Forward-mode differentiation passes custom operators by: it would give zeros."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op}: forward-mode differentiation (dual tensors, torch.func.jvp, jacfwd) is not supported: "
                "use backward"
            )


def is_plan(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Plan):
        raise TypeError(f"{op}: {name} must be a Plan, got {kind(value)}")


def route(
    logits: Any,
    top_k: Any,
    selection_bias: Any,
    num_groups: int,
    top_groups: int,
    expert_scale: Any,
    segments: Any,
    num_segments: Any,
) -> None:
    floats("route", "logits", logits, "[tokens, experts]", 2)
    experts = logits.shape[1]
    _is_integer("route", "top_k", top_k)
    if top_k < 1 or top_k > experts:
        raise ValueError(f"route: top_k must be between 1 and num_experts ({experts}), got {top_k}")
    if selection_bias is not None:
        _per_expert("selection_bias", selection_bias, logits)
    if num_groups != 1:
        if num_groups < 1 or experts % num_groups != 0:
            raise ValueError(f"route: groups must split num_experts ({experts}) evenly, got {num_groups} groups")
        if top_groups < 1 or top_groups > num_groups:
            raise ValueError(f"route: groups must keep between 1 and {num_groups} groups, got {top_groups}")
        kept = top_groups * (experts // num_groups)
        if kept < top_k:
            raise ValueError(f"route: groups must keep at least top_k ({top_k}) experts, got {kept}")
    elif top_groups != 1:
        raise ValueError(f"route: groups must keep between 1 and 1 groups, got {top_groups}")
    if expert_scale is not None:
        _per_expert("expert_scale", expert_scale, logits)
    if segments is not None:
        ids("route", "segments", segments, "[tokens]", 1)
        shape("route", "segments", segments, "[tokens]", (logits.shape[0],))
        same_device("route", "segments", segments, "logits", logits)
    integer("route", "num_segments", num_segments, 1, MAX_INT32)


def groups(value: Any) -> tuple[int, int]:
    """(num_groups, top_groups) of route's option groups."""
    if value is None:
        return 1, 1
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"route: groups must be None or a pair (num_groups, top_groups), got {value!r}")
    for entry in value:
        _is_integer("route", "groups", entry)
    return value[0], value[1]


def plan(op: str, experts: Any, num_experts: Any, capacity: Any, drop_policy: int, weights: Any) -> None:
    ids(op, "experts", experts, "[tokens, top_k]", 2)
    integer(op, "num_experts", num_experts, 1, MAX_INT32 - 1)
    if capacity is not None:
        integer(op, "capacity", capacity, 0, MAX_INT64)
    if drop_policy == DROP_POLICIES["probability"] and weights is None:
        raise ValueError(f"{op}: weights must be given with drop_policy 'probability', got None")
    if weights is not None:
        floats(op, "weights", weights, "[tokens, top_k]", 2)
        shape(op, "weights", weights, "[tokens, top_k]", tuple(experts.shape))
        same_device(op, "weights", weights, "experts", experts)


def slots(op: str, name: str, count: int) -> None:
    """Slots are numbered in int32."""
    if count > MAX_INT32:
        raise ValueError(f"{op}: {name} must name fewer than 2**31 slots, got {count}")


def permute(x: Any, row_slot: Any, slot_row: Any) -> None:
    copied("permute", "x", x)
    _slot_maps("permute", "x", x, row_slot, slot_row)
    _one_row_per_token("permute", "x", x, slot_row)


def copied(op: str, name: str, value: Any) -> None:
    """Tokens that are only copied. Their gradient is a sum, which only floats have."""
    tensor(op, name, value, "[tokens, hidden]", 2)
    if value.dtype in FLOATS:
        return
    if value.dtype not in COPIED:
        expected = "of a dtype that torch's stable ABI has (view others as uint8)"
        raise TypeError(f"{op}: {name} must be {expected}, got {name_of(value.dtype)}")
    if value.requires_grad and torch.is_grad_enabled():
        floats(op, f"{name}, which requires a gradient,", value, "[tokens, hidden]", 2)


def dispatch(x: Any, experts: Any) -> None:
    """What plan does not ask of dispatch's arguments."""
    if experts.shape[0] != x.shape[0]:
        raise ValueError(
            f"dispatch: experts must be of as many tokens as x has ({x.shape[0]}), got {list(experts.shape)}"
        )
    same_device("dispatch", "experts", experts, "x", x)


def grouped_gemm(a: Any, weight: Any, offsets: Any, bias: Any, row_slot: Any, slot_row: Any) -> None:
    op = "grouped_gemm"
    floats(op, "a", a, "[rows, k]", 2)
    floats(op, "w", weight, "[experts, n, k]", 3)
    same_device(op, "w", weight, "a", a)
    expert_dtype(op, "w", weight, "a", a)
    if weight.shape[2] != a.shape[1]:
        raise ValueError(f"{op}: w must be of shape [experts, n, {a.shape[1]}] to fit a, got {list(weight.shape)}")
    _offsets(op, "offsets", offsets, weight.shape[0], "a", a)
    if bias is not None:
        _expert_bias(op, "bias", bias, "[experts, n]", (weight.shape[0], weight.shape[1]), "a", a)
    if row_slot is not None:
        _slot_maps(op, "a", a, row_slot, slot_row, "gather")
        _one_row_per_token(op, "a", a, slot_row, "gather")


def main_grad(op: str, value: Any, weight: Tensor) -> None:
    """The buffer that backward adds the gradient of a weight to."""
    name, layout = "w.main_grad", "[experts, n, k]"
    tensor(op, name, value, layout, 3)
    if value.dtype != torch.float32:
        raise TypeError(f"{op}: {name} must be of dtype float32, got {name_of(value.dtype)}")
    shape(op, name, value, layout, tuple(weight.shape))
    same_device(op, name, value, "w", weight)
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(value.stride())}")


def combine(rows: Any, weights: Any, row_slot: Any, slot_row: Any) -> None:
    floats("combine", "rows", rows, "[rows, hidden]", 2)
    if weights is not None:
        floats("combine", "weights", weights, "[tokens, top_k]", 2)
        same_device("combine", "weights", weights, "rows", rows)
    _slot_maps("combine", "rows", rows, row_slot, slot_row)
    if row_slot.shape[0] != rows.shape[0]:
        raise ValueError(
            f"combine: plan must be of as many rows as rows has ({rows.shape[0]}), got row_slot {list(row_slot.shape)}"
        )
    if weights is not None:
        shape("combine", "weights", weights, "[tokens, top_k]", tuple(slot_row.shape))


def moe_mlp(x: Any, weights: Any, w_in: Any, w_out: Any, gated: bool, b_in: Any, b_out: Any) -> None:
    op = "moe_mlp"
    floats(op, "x", x, "[tokens, hidden]", 2)
    tokens, hidden = x.shape
    floats(op, "weights", weights, "[tokens, top_k]", 2)
    same_device(op, "weights", weights, "x", x)
    if weights.shape[0] != tokens:
        raise ValueError(f"{op}: weights must be of shape [{tokens}, top_k] to fit x, got {list(weights.shape)}")
    layout = "[experts, 2 * inner, hidden]" if gated else "[experts, inner, hidden]"
    floats(op, "w_in", w_in, layout, 3)
    same_device(op, "w_in", w_in, "x", x)
    expert_dtype(op, "w_in", w_in, "x", x)
    experts, wide, _ = w_in.shape
    if w_in.shape[2] != hidden:
        raise ValueError(f"{op}: w_in must be of shape {layout} with hidden = {hidden}, got {list(w_in.shape)}")
    if gated and wide % 2 != 0:
        raise ValueError(f"{op}: w_in must be of shape {layout} (gated), got {list(w_in.shape)}")
    floats(op, "w_out", w_out, "[experts, hidden, inner]", 3)
    same_device(op, "w_out", w_out, "x", x)
    expert_dtype(op, "w_out", w_out, "x", x)
    shape(op, "w_out", w_out, "[experts, hidden, inner]", (experts, hidden, wide // 2 if gated else wide))
    if b_in is not None:
        _expert_bias(op, "b_in", b_in, "[experts, 2 * inner]" if gated else "[experts, inner]", (experts, wide), "x", x)
    if b_out is not None:
        _expert_bias(op, "b_out", b_out, "[experts, hidden]", (experts, hidden), "x", x)


def mlp_experts(x: Tensor, weights: Tensor, w_in: Tensor, experts: Any, capacity: Any) -> None:
    """The ids given to moe_mlp, after its other tensors."""
    if experts is None:
        raise ValueError("moe_mlp: experts must be given where plan is None, got None")
    ids("moe_mlp", "experts", experts, "[tokens, top_k]", 2)
    shape("moe_mlp", "experts", experts, "[tokens, top_k]", tuple(weights.shape))
    same_device("moe_mlp", "experts", experts, "x", x)
    if w_in.shape[0] < 1:
        raise ValueError(f"moe_mlp: w_in must hold at least 1 expert, got {list(w_in.shape)}")
    if w_in.shape[0] >= MAX_INT32:
        raise ValueError(f"moe_mlp: w_in must hold fewer than 2**31 - 1 experts, got {list(w_in.shape)}")
    if not torch.compiler.is_compiling():
        slots("moe_mlp", "experts", weights.numel())
    if capacity is not None:
        integer("moe_mlp", "capacity", capacity, 0, MAX_INT64)


def mlp_choice(
    x: Tensor, weights: Tensor, w_in: Tensor, experts: Any, capacity: Any, drop_policy: Any, plan: Any
) -> None:
    """The ids or the plan, where the reference takes the place of the operators."""
    option("moe_mlp", "drop_policy", drop_policy, DROP_POLICIES)
    if plan is None:
        mlp_experts(x, weights, w_in, experts, capacity)
    else:
        is_plan("moe_mlp", "plan", plan)
        mlp_plan(weights, w_in, plan.offsets, plan.row_slot, plan.slot_row)


def mlp_plan(weights: Tensor, w_in: Tensor, offsets: Any, row_slot: Any, slot_row: Any) -> None:
    """The plan given to moe_mlp, after its other tensors."""
    _slot_maps("moe_mlp", "weights", weights, row_slot, slot_row)
    _offsets("moe_mlp", "plan.offsets", offsets, w_in.shape[0], "weights", weights)
    shape("moe_mlp", "plan.slot_row", slot_row, "[tokens, top_k]", tuple(weights.shape))


def _is_integer(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {kind(value)}")


def _per_expert(name: str, value: Any, logits: Tensor) -> None:
    floats("route", name, value, "[experts]", 1)
    shape("route", name, value, "[experts]", (logits.shape[1],))
    same_device("route", name, value, "logits", logits)


def _expert_bias(
    op: str, name: str, value: Any, layout: str, expected: tuple[int, int], first_name: str, first: Tensor
) -> None:
    floats(op, name, value, layout, 2)
    shape(op, name, value, layout, expected)
    same_device(op, name, value, first_name, first)
    expert_dtype(op, name, value, first_name, first)


def _offsets(op: str, name: str, value: Any, experts: int, first_name: str, first: Tensor) -> None:
    index(op, name, value, "[experts + 1]", 1)
    shape(op, name, value, "[experts + 1]", (experts + 1,))
    same_device(op, name, value, first_name, first)


def _slot_maps(op: str, first_name: str, first: Tensor, row_slot: Any, slot_row: Any, name: str = "plan") -> None:
    index(op, f"{name}.row_slot", row_slot, "[rows]", 1)
    same_device(op, f"{name}.row_slot", row_slot, first_name, first)
    index(op, f"{name}.slot_row", slot_row, "[tokens, top_k]", 2)
    same_device(op, f"{name}.slot_row", slot_row, first_name, first)


def _one_row_per_token(op: str, first_name: str, first: Tensor, slot_row: Tensor, name: str = "plan") -> None:
    if slot_row.shape[0] != first.shape[0]:
        raise ValueError(
            f"{op}: {name} must be of as many tokens as {first_name} has ({first.shape[0]}), "
            f"got slot_row {list(slot_row.shape)}"
        )


def _one_of(table: dict[Any, int]) -> str:
    return "one of " + ", ".join(repr(name) for name in table)


def kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (str, int, float)) else type(value).__name__


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:9]}... ({len(text)} characters)"


def name_of(value: Any) -> str:
    """The name of a dtype or layout."""
    return str(value).removeprefix("torch.")
