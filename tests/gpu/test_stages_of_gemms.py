"""The grouped GEMMs as nvcc compiles them, without torch: epilogues, orientations, kernels, gradients of weights."""

import itertools

import pytest
import torch
from params import ENUMS, STRUCTS

from accuracy import assert_bitwise_equal, hold, references
from cases import Case, crowded, every_case, integers, randn, seeded, some_dropped, transposed, unaligned
from moe_ops import reference
from moe_ops.checks import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_tiles = pytest.mark.parametrize("batch_invariant", [False, True], ids=["", "batch_invariant"])  # other tiles
every_orientation = pytest.mark.parametrize("orient", [lambda w: w, transposed], ids=["k_major", "n_major"])

FEW = Case("few_rows", tokens=20, experts=5, top_k=3, hidden=48, inner=40, choose=some_dropped)
MANY = Case("many_rows", tokens=90, experts=5, top_k=3, hidden=72, inner=136, choose=crowded)
ODD = Case("odd_many_rows", tokens=50, experts=4, top_k=2, hidden=37, inner=41, choose=some_dropped)
CASES = [FEW, MANY, ODD]
few_many_odd = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def shapes(case, n, k):
    return {"num_experts": case.experts, "num_rows": case.tokens * case.top_k, "n": n, "k": k}


def product(plan):
    def call(api, a, w, bias=None):
        return api.grouped_gemm(a, w, plan.offsets, bias=bias, gather=plan)

    return call


def store(card, case, a, w, bias=None, plan=None, batch_invariant=False):
    """a's rows, gathered by a plan where one is given, times the weights of their expert."""
    plan_ = plan or reference.plan(case.ids(), case.experts)
    out = card.new(case.tokens * case.top_k, w.shape[1], dtype=a.dtype)
    card.run(
        "grouped_gemm", "GroupedGemmParams", a=card.rows(a, plan), weight=card.weights(w), bias=card.vector(bias),
        offsets=card.put(plan_.offsets), **shapes(case, *w.shape[1:]), out=card.matrix(out),
        batch_invariant=batch_invariant,
    )  # fmt: skip
    card.fetch()
    return out


@every_case
@every_dtype
def test_every_case(case, dtype, card):
    """Whole numbers: every sum is exact, the gradients' too."""
    plan, gradients = reference.plan(case.ids(), case.experts), {}
    tensors = {
        "a": integers(case.tokens, case.hidden, dtype=dtype, limit=1),
        "w": integers(case.experts, case.inner, case.hidden, dtype=dtype, seed=1, limit=1),
        "bias": integers(case.experts, case.inner, dtype=dtype, seed=2),
    }
    oracle, eager = references(product(plan), tensors, ("w", "bias"), gradients)
    ours = {"result": store(card, case, **tensors, plan=plan)}
    ours |= weight_and_bias_grads(card, case, plan, gradients["result"].to(dtype), tensors["a"], dtype)
    hold(ours, eager, oracle, exact=True)


@few_many_odd
@every_dtype
@every_orientation
@pytest.mark.parametrize("place", [lambda t: t, unaligned], ids=["aligned", "unaligned"])
@every_tiles
def test_store(case, dtype, orient, place, batch_invariant, card):
    plan = reference.plan(case.ids(), case.experts)
    tensors = {
        "a": place(randn(case.tokens, case.hidden, dtype=dtype)),
        "w": orient(randn(case.experts, case.inner, case.hidden, dtype=dtype, seed=1, scale=case.hidden**-0.5)),
        "bias": randn(case.experts, case.inner, dtype=dtype, seed=2),
    }
    oracle, eager = references(product(plan), tensors, (), {})
    ours = store(card, case, **tensors, plan=plan, batch_invariant=batch_invariant)
    hold({"result": ours}, eager, oracle)


def multiply(card, a, w, offsets, slots=None, *, batch_invariant=False):
    """a's rows times the weights of their expert; with slots, row r of the product is that of a's row slots[r]."""
    (experts, n, k), rows = w.shape, len(a)
    out = card.new(rows, n, dtype=a.dtype)
    gather = {} if slots is None else {"row_slot": card.put(slots), "width": 1}
    card.run(
        "grouped_gemm", "GroupedGemmParams", num_experts=experts, num_rows=rows, n=n, k=k,
        a=STRUCTS["GatheredRows"](rows=card.matrix(a), num_rows=rows, **gather),
        weight=card.weights(w), offsets=card.put(offsets), out=card.matrix(out), batch_invariant=batch_invariant,
    )  # fmt: skip
    card.fetch()
    return out


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@every_orientation
@pytest.mark.parametrize("k", [136, 1000])
@every_tiles
def test_many_tiles(gathered, dtype, orient, k, batch_invariant, card):
    """More than there are processors, more steps than stages, experts without rows and with one, rows of none, no
    dimension a multiple."""
    ends = [0, 0, 1, 300, 300, 450, 1030]
    rows, n = 1100, 3064
    offsets, slots = torch.tensor(ends, dtype=torch.int32), torch.randperm(rows, generator=seeded(7), dtype=torch.int32)
    a, x = randn(rows, k, dtype=dtype), torch.empty(rows, k, dtype=dtype)
    x[slots.long()] = a
    w = orient(randn(len(ends) - 1, n, k, dtype=dtype, seed=1, scale=k**-0.5))
    oracle, eager = references(lambda api, a, w: api.grouped_gemm(a, w, offsets), {"a": a, "w": w}, (), {})
    out = multiply(card, *((x, w, offsets, slots) if gathered else (a, w, offsets)), batch_invariant=batch_invariant)
    hold({"result": out}, eager, oracle)


@pytest.mark.parametrize("ends", [(0, 385, 385, 386, 1030), (0, 300)], ids=["more_tiles_than_processors", "few_tiles"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@every_orientation
@every_tiles
def test_blocks_fetch_weights_for_one_another(ends, dtype, orient, batch_invariant, card):
    """On sm_90a: 256 rows an expert and more, odd numbers of row tiles, the last tile alone, rows of none; bitwise as
    by blocks that run alone, as they do where rows are gathered."""
    rows, n, k = ends[-1] + 60, 2936 if len(ends) > 2 else 40, 328
    offsets = torch.tensor(ends, dtype=torch.int32)
    a, w = randn(rows, k, dtype=dtype), orient(randn(len(ends) - 1, n, k, dtype=dtype, seed=1, scale=k**-0.5))
    oracle, eager = references(lambda api, a, w: api.grouped_gemm(a, w, offsets), {"a": a, "w": w}, (), {})
    together = multiply(card, a, w, offsets, batch_invariant=batch_invariant)
    hold({"result": together}, eager, oracle)
    slots = torch.arange(rows, dtype=torch.int32)
    assert_bitwise_equal(together, multiply(card, a, w, offsets, slots, batch_invariant=batch_invariant))


@pytest.mark.parametrize("tokens", [3, 70])
@every_dtype
def test_long_reduction(tokens, dtype, card):
    """Split over the blocks where there are few rows."""
    case = Case("long", tokens=tokens, experts=2, top_k=1, hidden=2500, inner=32)
    tensors = {"a": randn(tokens, 2500, dtype=dtype), "w": randn(2, 32, 2500, dtype=dtype, seed=1, scale=0.02)}
    plan = reference.plan(case.ids(), 2)
    oracle, eager = references(product(plan), tensors, (), {})
    hold({"result": store(card, case, **tensors, plan=plan)}, eager, oracle)


@few_many_odd
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@every_orientation
def test_float32_weights_are_rounded(case, dtype, orient, card):
    plan = reference.plan(case.ids(), case.experts)
    a, w = randn(case.tokens, case.hidden, dtype=dtype), randn(case.experts, case.inner, case.hidden, seed=1)
    rounded = store(card, case, a, orient(w).to(dtype), plan=plan)
    oracle, eager = references(product(plan), {"a": a, "w": w.to(dtype)}, (), {})
    ours = store(card, case, a, orient(w), plan=plan)
    hold({"result": ours}, eager, oracle)
    hold({"result": rounded}, eager, oracle)


# ---- epilogues ------------------------------------------------------------------------------------------------------

ACTIVATE = [{"activation": name, "gated": gated} for name in ACTIVATIONS for gated in (True, False)]
ACTIVATE += [{"layout": "interleaved", "alpha": 1.702, "limit": 1.0, "up_offset": 1.0}, {"limit": 0.5, "gated": False}]
# Every activation once, and two of them in every kernel.
EPILOGUES = [(options, FEW, torch.bfloat16) for options in ACTIVATE]
EPILOGUES += [(options, *rest) for options in (ACTIVATE[0], ACTIVATE[-2]) for rest in itertools.product(CASES, DTYPES)]
every_epilogue = pytest.mark.parametrize("options, case, dtype", EPILOGUES)


def activation_of(activation="silu", layout="concatenated", **numbers):
    return STRUCTS["Activation"](act=ACTIVATIONS[activation], interleaved=layout == "interleaved", **numbers)


def route_weights(case):
    return torch.rand(case.tokens, case.top_k, generator=seeded(4)) + 0.5


@every_epilogue
@every_tiles
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", ""])
def test_activate(options, case, dtype, batch_invariant, scaled, card):
    """The pre-activation and what becomes of it; the rows as they are, or times their route weight."""
    plan, score = reference.plan(case.ids(), case.experts), route_weights(case)
    columns = case.inner * (2 if options.get("gated", True) else 1)
    tensors = {
        "x": randn(case.tokens, case.hidden, dtype=dtype),
        "w": randn(case.experts, columns, case.hidden, dtype=dtype, seed=1, scale=2 * case.hidden**-0.5),
        "bias": randn(case.experts, columns, dtype=dtype, seed=2),
    }

    def call(api, x, w, bias):
        rows = api.permute(x, plan)
        if scaled:
            rows = (rows * score.flatten()[plan.row_slot.long()].unsqueeze(1)).to(x.dtype)
        pre = api.grouped_gemm(rows, w, plan.offsets, bias=bias)
        return {"pre": pre, "inner": api.activate(pre, **options)}

    oracle, eager = references(call, tensors, (), {})
    rows = case.tokens * case.top_k
    ours = {"pre": card.new(rows, columns, dtype=dtype), "inner": card.new(rows, case.inner, dtype=dtype)}
    card.run(
        "grouped_gemm", "GroupedGemmParams",
        a=card.rows(tensors["x"], plan, score if scaled else None), weight=card.weights(tensors["w"]),
        offsets=card.put(plan.offsets), **shapes(case, columns, case.hidden), bias=card.vector(tensors["bias"]),
        epilogue=ENUMS["Epilogue"].index("activate"), activation=activation_of(**options),
        batch_invariant=batch_invariant, out=card.matrix(ours["inner"]), pre=card.matrix(ours["pre"]),
    )  # fmt: skip
    card.fetch()
    hold(ours, eager, oracle)


@every_epilogue
@every_tiles
def test_activate_backward(options, case, dtype, batch_invariant, card):
    """dH, the inner rows times their score, and the score's gradient, from dY and the pre-activation."""
    plan, rows = reference.plan(case.ids(), case.experts), case.tokens * case.top_k
    columns = case.inner * (2 if options.get("gated", True) else 1)
    tensors = {
        "pre": randn(rows, columns, dtype=dtype),
        "score": route_weights(case),
        "w": randn(case.experts, case.hidden, case.inner, dtype=dtype, seed=1, scale=case.inner**-0.5),
        "bias": randn(case.experts, case.hidden, dtype=dtype, seed=2),
    }
    tensors["pre"][plan.offsets[-1] :] = 0
    grad_y = randn(case.tokens, case.hidden, dtype=dtype, seed=3)

    def call(api, pre, score, w, bias):
        inner = api.activate(pre, **options)
        s = score.flatten()[plan.row_slot.long()].unsqueeze(1)
        y = api.combine(api.grouped_gemm(inner, w, plan.offsets, bias=bias), score, plan)
        kept = torch.arange(rows) < plan.offsets[-1]
        return {"y": y, "scaled": torch.where(kept.unsqueeze(1), inner * s, 0).to(inner.dtype).detach()}

    oracle, eager = references(call, tensors, ("pre", "score"), {"y": grad_y.double()})
    ours = {
        "grad pre": card.new(rows, columns, dtype=dtype),
        "scaled": card.new(rows, case.inner, dtype=dtype),
        "grad score": card.new(case.tokens, case.top_k, dtype=torch.float32),
    }
    card.run(
        "grouped_gemm", "GroupedGemmParams", a=card.rows(grad_y, plan), weight=card.weights(tensors["w"].mT),
        offsets=card.put(plan.offsets), **shapes(case, case.inner, case.hidden),
        epilogue=ENUMS["Epilogue"].index("activate_backward"), activation=activation_of(**options),
        batch_invariant=batch_invariant,
        out=card.matrix(ours["scaled"]), pre=card.matrix(tensors["pre"]), grad_pre=card.matrix(ours["grad pre"]),
        score=card.vector(tensors["score"]), score_bias=card.vector(tensors["bias"]),
        grad_score=card.address(ours["grad score"]),
    )  # fmt: skip
    card.fetch()
    hold(ours, *({name: each[name] for name in ours} for each in (eager, oracle)))


# ---- gradients of weights and biases --------------------------------------------------------------------------------


def weight_and_bias_grads(card, case, plan, grad, a, out_dtype, accumulate=None):
    """From grad [R, N] and the rows of a that the plan reads."""
    n, k = grad.shape[1], a.shape[1]
    ours = {
        "grad w": card.new(case.experts, n, k, dtype=out_dtype, values=accumulate),
        "grad bias": card.new(case.experts, n, dtype=out_dtype),
    }
    sizes, grad, offsets = shapes(case, n, k), card.rows(grad), card.put(plan.offsets)
    out_type = card.dtype(out_dtype)
    card.run(
        "grouped_gemm_weight_grad", "WeightGradParams", grad=grad, a=card.rows(a, plan), offsets=offsets, **sizes,
        out=card.address(ours["grad w"]), out_dtype=out_type, accumulate=accumulate is not None,
    )  # fmt: skip
    del sizes["k"]
    card.run(
        "grouped_gemm_bias_grad", "BiasGradParams", grad=grad, offsets=offsets, **sizes,
        out=card.address(ours["grad bias"]), out_dtype=out_type,
    )  # fmt: skip
    card.fetch()
    return ours


@few_many_odd
@every_dtype
@pytest.mark.parametrize("float32_out", [False, True])
def test_weight_and_bias_gradients(case, dtype, float32_out, card):
    plan = reference.plan(case.ids(), case.experts)
    out_dtype = torch.float32 if float32_out else dtype
    tensors = {
        "a": randn(case.tokens, case.hidden, dtype=dtype),
        "w": torch.zeros(case.experts, case.inner, case.hidden, dtype=out_dtype),
        "bias": torch.zeros(case.experts, case.inner, dtype=out_dtype),
    }
    grad = randn(case.tokens * case.top_k, case.inner, dtype=dtype, seed=3)
    oracle, eager = references(product(plan), tensors, ("w", "bias"), {"result": grad.double()})
    ours = weight_and_bias_grads(card, case, plan, grad, tensors["a"], out_dtype)
    hold(ours, *({name: each[name] for name in ours} for each in (eager, oracle)))


@few_many_odd
def test_weight_gradient_is_added(case, card):
    """Whole numbers, to whole numbers that are there."""
    plan = reference.plan(case.ids(), case.experts)
    grad, a = integers(case.tokens * case.top_k, case.inner), integers(case.tokens, case.hidden, seed=1)
    there = integers(case.experts, case.inner, case.hidden, seed=2, limit=9)
    alone = weight_and_bias_grads(card, case, plan, grad, a, torch.float32)
    added = weight_and_bias_grads(card, case, plan, grad, a, torch.float32, accumulate=there)
    assert_bitwise_equal(added["grad w"], alone["grad w"] + there)
