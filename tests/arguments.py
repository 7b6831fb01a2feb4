"""Arguments for the tests of errors: valid calls, tensors that are wrong, what the messages say."""

import torch

from moe_ops.types import Plan

T, E, K, H, INNER = 3, 4, 2, 6, 5


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def half(*shape):
    return zeros(*shape, dtype=torch.bfloat16)


def ints(*shape, dtype=torch.int32):
    return zeros(*shape, dtype=dtype)


def elsewhere(*shape, dtype=torch.float32):
    """A tensor of another device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def a_plan(tokens=T, top_k=K, experts=E, **changed):
    maps = {
        "offsets": ints(experts + 1),
        "row_slot": ints(tokens * top_k),
        "slot_row": ints(tokens, top_k),
        "counts": ints(experts),
    }
    return Plan(**(maps | changed))


# A valid call of each function.
GOOD = {
    "route": {"logits": zeros(T, E), "top_k": K},
    "plan": {"experts": ints(T, K), "num_experts": E},
    "permute": {"x": zeros(T, H), "plan": a_plan()},
    "grouped_gemm": {"a": zeros(T * K, H), "w": zeros(E, INNER, H), "offsets": ints(E + 1)},
    "combine": {"rows": zeros(T * K, H), "weights": zeros(T, K), "plan": a_plan()},
    "dispatch": {"x": zeros(T, H), "experts": ints(T, K), "num_experts": E},
    "moe_mlp": {
        "x": zeros(T, H),
        "weights": zeros(T, K),
        "experts": ints(T, K),
        "w_in": zeros(E, 2 * INNER, H),
        "w_out": zeros(E, H, INNER),
    },
}

FLOAT = "must be of dtype float32, bfloat16, float16 or float64, got"
ID = "must be of dtype int32 or int64, got"
INT32 = "must be of dtype int32, as plan returns it, got int64"
SCORE = "must be one of 'softmax', 'softmax_selected', 'sigmoid', 'sqrtsoftplus', 'identity', got"
POLICY = "must be one of 'position', 'choice_first', 'probability', got"
ACTIVATION = "must be one of 'silu', 'gelu', 'gelu_tanh', 'relu', 'relu2', got"
COPIED = "must be of a dtype that torch's stable ABI has (view others as uint8), got"
ON_CPU = "must be on the device of {} (cpu), got meta"
EXPERT_DTYPE = "must have the dtype of {} (float32), got {}"
