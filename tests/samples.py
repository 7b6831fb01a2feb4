"""Small valid calls of every operator, for the tests of what holds for all of them."""

from collections.abc import Callable
from typing import Any

import torch

from cases import DEVICE
from moe_ops import prepack, reference
from moe_ops.types import Plan

T, E, K, H, INNER = 5, 4, 2, 6, 3


class Maker:
    """Seeded tensors of one dtype on one device; the differentiable ones require grad where asked."""

    def __init__(self, device: torch.device, dtype: torch.dtype, grad: bool = False):
        self.device, self.dtype, self.grad = device, dtype, grad
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, grad: bool | None = None) -> torch.Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.1
        placed = values.to(device=self.device, dtype=dtype or self.dtype)
        return placed.requires_grad_(self.grad if grad is None else grad)

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def experts(self) -> torch.Tensor:
        """[T, K] with an empty expert, a dropped slot and an id that is no expert."""
        ids = [[0, 1], [3, 0], [-1, 3], [1, 0], [0, E]]
        return torch.tensor(ids, dtype=torch.int32, device=self.device)

    def plan(self) -> Plan:
        made = reference.plan(self.experts().cpu(), E, capacity=3)
        return Plan(*(tensor.contiguous().to(self.device) for tensor in made))


Args = tuple[Any, ...]

# allow_tf32, batch_invariant
EXACT, INVARIANT_TF32 = (False, False), (True, True)


def route(make: Maker) -> list[Args]:
    logits, bias, scale = make(T, E), make(E, dtype=make.compute, grad=False), make(E, dtype=make.compute)
    segments = torch.tensor([0, 1, 1, -1, 0], dtype=torch.int32, device=make.device)
    return [
        (logits, K, 0, None, None, 1, 1, 1, 0, 0, 1e-20, 1.0, 1.0, 0.0, False, None, 1),
        (logits, K, 2, bias, scale, 2, 1, 1, 0, 1, 1e-20, 1.0, 2.5, 0.0, True, segments, 2),
        (logits, 1, 1, None, scale, 1, 1, 1, 0, 3, 1e-20, 2.0, 1.0, 30.0, True, None, 1),
    ]


def route_backward(make: Maker) -> list[Args]:
    experts = torch.tensor([[0, 1], [3, 0], [1, 3], [1, 0], [0, 2]], dtype=torch.int32, device=make.device)
    grads = [make(*shape, dtype=make.compute) for shape in ((T, K), (1, E), (T,))]
    logits, scale = make(T, E), make(E, dtype=make.compute)
    return [
        (grads[0], None, None, logits, experts, 0, None, 0, 1e-20, 1.0, 1.0, 0.0, None, 1),
        (*grads, logits, experts, 2, scale, 1, 1e-20, 1.0, 2.5, 30.0, None, 1),
    ]


def plan(make: Maker) -> list[Args]:
    return [
        (make.experts(), E, None, 0, None),
        (make.experts().long(), E, 2, 1, None),
        (make.experts(), E, 1, 2, make(T, K)),
    ]


def permute(make: Maker) -> list[Args]:
    p = make.plan()
    return [(make(T, H), p.row_slot, p.slot_row)]


def grouped_gemm(make: Maker) -> list[Args]:
    p = make.plan()
    rows, gather = (None, None, None), (p.row_slot, p.slot_row, None)
    calls: list[Args] = [
        (make(T * K, H), make(E, INNER, H), p.offsets, None, *rows, *EXACT),
        (make(T, H), make(E, H, INNER).transpose(1, 2), p.offsets, make(E, INNER), *gather, *INVARIANT_TF32),
    ]
    if make.dtype in (torch.bfloat16, torch.float16):
        calls.append((make(T * K, H), make(E, INNER, H, dtype=torch.float32), p.offsets, None, *rows, *EXACT))
    if not make.grad and DEVICE == "cpu":
        w = prepack(make(E, INNER, H))
        calls.append((make(T * K, H), w.stand_in, p.offsets, make(E, INNER), None, None, w.panels, *EXACT))
    return calls


def grouped_gemm_weight_grad(make: Maker) -> list[Args]:
    p = make.plan()
    return [
        (make(T * K, INNER), make(T * K, H), p.offsets, None, 1, make.dtype, False),
        (make(T * K, INNER), make(T, H), p.offsets, p.row_slot, K, make.compute, True),
        (make(T * K, INNER), make(T, H), p.offsets, p.row_slot, K, make.compute, False, True),
    ]


def grouped_gemm_weight_grad_(make: Maker) -> list[Args]:
    p = make.plan()
    out = make(E, INNER, H, dtype=make.compute)
    return [(out, make(T * K, INNER), make(T, H), p.offsets, p.row_slot, K, False)]


def grouped_gemm_bias_grad(make: Maker) -> list[Args]:
    return [(make(T * K, INNER), make.plan().offsets, make.dtype)]


def combine(make: Maker) -> list[Args]:
    p = make.plan()
    rows = make(T * K, H)
    return [
        (rows, None, p.row_slot, p.slot_row),
        (rows, make(T, K), p.row_slot, p.slot_row),
        (rows, make(T, K, dtype=make.compute), p.row_slot, p.slot_row),
    ]


def combine_backward(make: Maker) -> list[Args]:
    p = make.plan()
    grad, rows, weights = make(T, H), make(T * K, H), make(T, K, dtype=make.compute)
    return [
        (grad, rows, weights, p.row_slot, p.slot_row, True, True),
        (grad, None, weights, p.row_slot, p.slot_row, True, False),
        (grad, rows, weights, p.row_slot, p.slot_row, False, True),
    ]


GPT_OSS = (0, True, True, 1.702, 7.0, 1.0)
PLAIN = (4, False, False, 1.0, float("inf"), 0.0)


def moe_mlp(make: Maker) -> list[Args]:
    p = make.plan()
    x, weights = make(T, H), make(T, K, dtype=make.compute)
    w_in, b_in, w_out, b_out = make(E, 2 * INNER, H), make(E, 2 * INNER), make(E, H, INNER), make(E, H)
    maps = (p.offsets, p.row_slot, p.slot_row)
    plain = make(E, INNER, H)
    calls: list[Args] = [
        (x, weights, w_in, w_out, b_in, b_out, *maps, *GPT_OSS, False, *EXACT, True, None, None),
        (x, weights, plain, w_out, None, None, *maps, *PLAIN, True, *INVARIANT_TF32, True, None, None),
    ]
    if not make.grad:
        calls.append((x, weights, plain, w_out, None, None, *maps, *PLAIN, False, *EXACT, False, None, None))
    if not make.grad and DEVICE == "cpu":
        packed_in, packed_out = prepack(w_in), prepack(w_out)
        weights_in_out = (packed_in.stand_in, packed_out.stand_in)
        panels = (packed_in.panels, packed_out.panels)
        calls.append((x, weights, *weights_in_out, None, b_out, *maps, *GPT_OSS, False, *EXACT, False, *panels))
    return calls


def moe_mlp_inference(make: Maker) -> list[Args]:
    x, weights = make(T, H), make(T, K, dtype=make.compute)
    w_in, b_in, w_out, b_out = make(E, 2 * INNER, H), make(E, 2 * INNER), make(E, H, INNER), make(E, H)
    plain, ids = make(E, INNER, H), make.experts()
    return [
        (x, weights, ids, w_in, w_out, b_in, b_out, *GPT_OSS, False, *EXACT, None, None),
        (x, weights, ids.long(), plain, w_out, None, None, *PLAIN, True, *INVARIANT_TF32, None, None),
    ]


def moe_mlp_backward(make: Maker) -> list[Args]:
    p = make.plan()
    grad, x, weights = make(T, H), make(T, H), make(T, K, dtype=make.compute)
    w_in, w_out, b_out = make(E, 2 * INNER, H), make(E, H, INNER), make(E, H)
    args = (grad, x, make(T * K, 2 * INNER), weights, w_in, w_out, b_out, p.offsets, p.row_slot, p.slot_row, *GPT_OSS)
    return [
        (*args, False, *EXACT, make.dtype, *(True,) * 5),
        (*args, True, *INVARIANT_TF32, None, True, True, False, True, False),
        (*args, False, *EXACT, None, False, False, True, False, True),
        (*args[:4], *(w.mT.contiguous().mT for w in (w_in, w_out)), *args[6:], False, *EXACT, make.dtype, *(True,) * 5),
    ]


SAMPLES: dict[str, Callable[[Maker], list[Args]]] = {
    "route": route,
    "route_backward": route_backward,
    "plan": plan,
    "permute": permute,
    "grouped_gemm": grouped_gemm,
    "grouped_gemm_weight_grad": grouped_gemm_weight_grad,
    "grouped_gemm_weight_grad_": grouped_gemm_weight_grad_,
    "grouped_gemm_bias_grad": grouped_gemm_bias_grad,
    "combine": combine,
    "combine_backward": combine_backward,
    "moe_mlp": moe_mlp,
    "moe_mlp_inference": moe_mlp_inference,
    "moe_mlp_backward": moe_mlp_backward,
}
