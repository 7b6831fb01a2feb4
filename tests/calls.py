"""The operators as accuracy.compare calls them, for any API that has them, tensors to call moe_mlp with, and which
operators were called.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accuracy import place
from cases import integers, powers, randn, seeded

GEMM = ("a", "w", "bias")  # what has a gradient
MLP = ("x", "weights", "w_in", "w_out", "b_in", "b_out")
GPT_OSS = {"activation": "silu", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0, "layout": "interleaved"}


def permute(ids, experts, **options):
    """Plan and permute by one API."""

    def call(api, x):
        return api.permute(x, api.plan(place(ids, x.device), experts, **options))

    return call


def combine(ids, experts, **options):
    """By the plan of ids, with weights or without."""

    def call(api, rows, weights=None):
        return api.combine(rows, weights, api.plan(place(ids, rows.device), experts, **options))

    return call


def product(offsets):
    def call(api, a, w, bias=None):
        return api.grouped_gemm(a, w, place(offsets, a.device), bias=bias)

    return call


def gathered(ids, experts):
    """The same through a plan: a is x, and row r reads its token."""

    def call(api, a, w, bias=None):
        plan = api.plan(place(ids, a.device), experts)
        return api.grouped_gemm(a, w, plan.offsets, bias=bias, gather=plan)

    return call


def moe_mlp(ids, **options):
    def call(api, x, weights, w_in, w_out, b_in=None, b_out=None):
        return api.moe_mlp(x, weights, place(ids, x.device), w_in, w_out, b_in=b_in, b_out=b_out, **options)

    return call


def exact_tensors(case, dtype=torch.float32, gated=True, seed=0):
    """Whole numbers, so that with relu every step is exact in float32."""
    wide = case.inner * (2 if gated else 1)
    e, h, i = case.experts, case.hidden, case.inner
    return {
        "x": integers(case.tokens, h, dtype=dtype, seed=seed, limit=1),
        "weights": powers(case.tokens, case.top_k, seed=seed + 1),
        "w_in": integers(e, wide, h, dtype=dtype, seed=seed + 2, limit=1),
        "w_out": integers(e, h, i, dtype=dtype, seed=seed + 3, limit=1),
        "b_in": integers(e, wide, dtype=dtype, seed=seed + 4, limit=1),
        "b_out": integers(e, h, dtype=dtype, seed=seed + 5, limit=1),
    }


def random_tensors(case, dtype=torch.float32, gated=True, weight_dtype=None, bias_scale=0.5):
    wide = case.inner * (2 if gated else 1)
    e, h, i, weight_dtype = case.experts, case.hidden, case.inner, weight_dtype or dtype
    return {
        "x": randn(case.tokens, h, dtype=dtype),
        "weights": torch.rand(case.tokens, case.top_k, generator=seeded(1)),
        "w_in": randn(e, wide, h, dtype=weight_dtype, seed=2, scale=2 * h**-0.5),
        "w_out": randn(e, h, i, dtype=weight_dtype, seed=3, scale=2 * i**-0.5),
        "b_in": randn(e, wide, dtype=weight_dtype, seed=4, scale=bias_scale),
        "b_out": randn(e, h, dtype=weight_dtype, seed=5, scale=bias_scale),
    }


class Calls(TorchDispatchMode):
    """The operators of ours that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moe_ops":
            self.seen.append((func._schema.name.removeprefix("moe_ops::"), args))
        return func(*args, **(kwargs or {}))
