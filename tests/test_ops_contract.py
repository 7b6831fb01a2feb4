"""What torch asks of every operator: honest schemas, fakes that agree with kernels, gradients that are derivatives.

Beside it what the gradients keep and compute: the memory law, and that nothing unneeded is computed.
"""

import itertools
import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import moe_ops
from calls import Calls
from cases import DEVICE, WIDEST, integers, offsets_of, randn
from moe_ops.library import OPERATORS
from samples import INNER, SAMPLES, E, H, K, Maker, T

DIFFERENTIABLE = ("route", "permute", "grouped_gemm", "combine", "moe_mlp")
SCORES = ("softmax", "softmax_selected", "sigmoid", "sqrtsoftplus", "identity")
RENORMALIZE = (False, True, "clamp", "pnorm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def test_every_operator_has_samples():
    assert tuple(SAMPLES) == OPERATORS


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, dtype, device):
    for args in SAMPLES[name](Maker(device, dtype)):
        torch.library.opcheck(getattr(torch.ops.moe_ops, name).default, args)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name, dtype, device):
    for args in SAMPLES[name](Maker(device, dtype, grad=True)):
        torch.library.opcheck(getattr(torch.ops.moe_ops, name).default, args)


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_start_early_on_hopper_alone(name, device, launches, early_launches, monkeypatch):
    for arch in (80, 90):
        monkeypatch.setenv("MOE_OPS_SIMT_ARCH", str(arch))
        before = launches(), early_launches()
        for args in SAMPLES[name](Maker(device, torch.bfloat16)):
            getattr(torch.ops.moe_ops, name)(*args)
        started, early = launches() - before[0], early_launches() - before[1]
        assert started > 0 and early == (started if arch == 90 else 0)


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU has float64")
@pytest.mark.parametrize("name", sorted({*OPERATORS} - {"plan", "permute"}))
def test_float64_is_refused_where_there_is_none(name, device):
    for args in SAMPLES[name](Maker(device, torch.float64)):
        with pytest.raises(ValueError, match=r"^\w+: float64 is supported on the CPU only"):
            getattr(torch.ops.moe_ops, name)(*args)


@pytest.fixture
def make(device):
    return Maker(device, WIDEST, grad=True)


@pytest.mark.float64
@pytest.mark.parametrize("renormalize", RENORMALIZE)
@pytest.mark.parametrize("score", SCORES)
def test_gradient_of_route(score, renormalize, make):
    segments = torch.tensor([0, 1, 1, -1, 0], device=make.device)

    def call(logits, expert_scale):
        result = moe_ops.route(
            logits, K, score=score, renormalize=renormalize, p=3.0, scale=2.5, expert_scale=expert_scale, stats=True,
            segments=segments, num_segments=3,
        )  # fmt: skip
        return result.weights, result.mean_prob, result.logsumexp

    assert gradcheck(call, (make(T, E), make(E)))


@pytest.mark.float64
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 0.7},
        {"softcap": 0.7, "score": "softmax_selected"},
        {"selection_bias": True},
        {"selection_bias": True, "score": "sigmoid", "groups": (2, 1), "renormalize": True},
        {"groups": (2, 1), "group_score": "max", "group_mask": "zero"},
        {"groups": (2, 2), "group_score": "max"},
        {"renormalize": True, "eps": 0.3},
        {"renormalize": "clamp", "eps": 10.0},
        {"renormalize": "pnorm", "p": 1.0},
        {"renormalize": "pnorm", "p": 0.5},
    ],
    ids=str,
)
def test_gradient_of_route_options(options, make):
    if "selection_bias" in options:
        options = options | {"selection_bias": torch.tensor([0.0, 3.0, 0.5, 1.0], device=make.device)}
    assert gradcheck(lambda logits: moe_ops.route(logits, K, **options)[0], (make(T, E),))


@pytest.mark.float64
def test_gradient_of_each_route_output_alone(make):
    logits = make(T, E)
    for output in ("weights", "mean_prob", "logsumexp"):
        assert gradcheck(lambda z, output=output: getattr(moe_ops.route(z, K, stats=True), output), (logits,))


@pytest.mark.float64
def test_gradients_of_permute(make):
    plan = make.plan()
    assert gradcheck(lambda x: moe_ops.permute(x, plan), (make(T, H),))
    assert gradgradcheck(lambda x: moe_ops.permute(x, plan), (make(T, H),))


@pytest.mark.float64
@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("gather", (False, True))
@pytest.mark.parametrize("transposed", (False, True))
def test_gradient_of_grouped_gemm(transposed, gather, biased, make):
    plan = make.plan()
    weight = make(E, H, INNER) if transposed else make(E, INNER, H)

    def call(a, w, bias=None):
        w = w.transpose(1, 2) if transposed else w
        return moe_ops.grouped_gemm(a, w, plan.offsets, bias=bias, gather=plan if gather else None)

    assert gradcheck(call, (make(T if gather else T * K, H), weight, *([make(E, INNER)] if biased else [])))


@pytest.mark.float64
def test_gradients_of_combine(make):
    plan = make.plan()
    assert gradcheck(lambda rows, weights: moe_ops.combine(rows, weights, plan), (make(T * K, H), make(T, K)))
    assert gradcheck(lambda rows: moe_ops.combine(rows, None, plan), (make(T * K, H),))
    assert gradgradcheck(lambda rows: moe_ops.combine(rows, None, plan), (make(T * K, H),))


@pytest.mark.float64
@pytest.mark.parametrize("weight_on", ("output", "input"))
@pytest.mark.parametrize("kind", ("plain", "concatenated", "interleaved"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_of_moe_mlp(activation, kind, weight_on, make):
    gated = kind != "plain"
    pre = 2 * INNER if gated else INNER
    options = {"alpha": 1.702, "limit": 1.4, "up_offset": 1.0} if weight_on == "output" else {}

    layout = "interleaved" if kind == "interleaved" else "concatenated"

    def call(x, weights, w_in, w_out, b_in=None, b_out=None):
        w_in = w_in - 0.6  # both signs of the pre-activation
        return moe_ops.moe_mlp(
            x, weights, make.experts(), w_in, w_out, b_in=b_in, b_out=b_out, activation=activation, gated=gated,
            layout=layout, weight_on=weight_on, capacity=3, **options,
        )  # fmt: skip

    biases = (make(E, pre), make(E, H)) if weight_on == "output" else ()
    assert gradcheck(call, (make(T, H), make(T, K), make(E, pre, H), make(E, H, INNER), *biases))


@pytest.mark.float64
@pytest.mark.parametrize("hidden, inner", [(H, 0), (0, INNER)])
def test_gradient_of_moe_mlp_without_inner_or_hidden(hidden, inner, make):
    """Without inner columns the output is the bias, and the weights still have a gradient."""

    def call(x, weights, w_in, w_out, b_in, b_out):
        return moe_ops.moe_mlp(x, weights, make.experts(), w_in, w_out, b_in=b_in, b_out=b_out)

    tensors = make(T, hidden), make(E, 2 * inner, hidden), make(E, hidden, inner), make(E, 2 * inner), make(E, hidden)
    assert gradcheck(call, (tensors[0], make(T, K), *tensors[1:]))


@pytest.mark.float64
def test_gradient_of_a_whole_layer(make):
    def call(x, router, w_in, w_out):
        weights, experts = moe_ops.route(x @ router.t(), K, renormalize=True)
        rows, plan = moe_ops.dispatch(x, experts, E)
        inner = moe_ops.grouped_gemm(rows, w_in, plan.offsets).tanh()
        split = moe_ops.combine(moe_ops.grouped_gemm(inner, w_out, plan.offsets), weights, plan)
        return split + moe_ops.moe_mlp(x, weights, experts, w_in, w_out, gated=False)

    assert gradcheck(call, (make(T, H), make(E, H), make(E, INNER, H), make(E, H, INNER)))


def _mlp_operands(make):
    make.grad = False
    shapes = {
        "x": (T, H),
        "weights": (T, K),
        "w_in": (E, 2 * INNER, H),
        "w_out": (E, H, INNER),
        "b_in": (E, 2 * INNER),
        "b_out": (E, H),
    }
    return {name: make(*shape) for name, shape in shapes.items()}


def _mlp(make, x, weights, **rest):
    return moe_ops.moe_mlp(x, weights, make.experts(), rest.pop("w_in"), rest.pop("w_out"), **rest)


def test_moe_mlp_gives_each_subset_of_gradients(make):
    operands = _mlp_operands(make)
    every = {name: tensor.clone().requires_grad_() for name, tensor in operands.items()}
    _mlp(make, **every).square().sum().backward()
    for wanted in itertools.product((False, True), repeat=len(operands)):
        if not any(wanted):
            continue
        some = {name: operands[name].clone().requires_grad_(want) for name, want in zip(operands, wanted, strict=True)}
        y = _mlp(make, **some).square().sum()
        with Calls() as calls:
            y.backward()
        ((name, args),) = calls.seen
        assert name == "moe_mlp_backward"
        b_in_dtype, *needs = args[-6:]
        assert [*needs[:4], b_in_dtype is not None, needs[4]] == list(wanted)
        for key, tensor in some.items():
            if tensor.requires_grad:
                torch.testing.assert_close(tensor.grad, every[key].grad)
            else:
                assert tensor.grad is None


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        ("", ["grouped_gemm", "combine", "grouped_gemm_weight_grad", "grouped_gemm_bias_grad"]),
        ("a", ["grouped_gemm_weight_grad", "grouped_gemm_bias_grad"]),
        ("w", ["grouped_gemm", "combine", "grouped_gemm_bias_grad"]),
        ("aw", ["grouped_gemm_bias_grad"]),
        ("b", ["grouped_gemm", "combine", "grouped_gemm_weight_grad"]),
    ],
)
def test_grouped_gemm_computes_only_what_is_needed(frozen, expected, make):
    plan = make.plan()
    a, w, b = (
        make(T, H, grad="a" not in frozen),
        make(E, INNER, H, grad="w" not in frozen),
        make(E, INNER, grad="b" not in frozen),
    )
    y = moe_ops.grouped_gemm(a, w, plan.offsets, bias=b, gather=plan).sum()
    with Calls() as calls:
        y.backward()
    assert [name for name, _ in calls.seen] == expected


@pytest.mark.parametrize("gated", (False, True))
def test_memory_law_of_moe_mlp(gated, make):
    """For backward nothing is kept but x, the weights, the plan and one pre-activation."""
    plan, pre = make.plan(), 2 * INNER if gated else INNER
    x, weights, w_in, w_out, b_in = make(T, H), make(T, K), make(E, pre, H), make(E, H, INNER), make(E, pre)
    given = {t.untyped_storage().data_ptr() for t in (x, weights, w_in, w_out, b_in, *plan)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = moe_ops.moe_mlp(x, weights, None, w_in, w_out, b_in=b_in, gated=gated, plan=plan)
    new = [size for pointer, size in kept.items() if pointer not in given]
    assert new == [T * K * pre * x.element_size()]
    y.sum().backward()


def test_pre_activation_is_written_only_for_a_gradient(make):
    operands = {name: tensor.requires_grad_() for name, tensor in _mlp_operands(make).items()}

    def keeps() -> bool:
        with Calls() as calls:
            _mlp(make, **operands)
        name, args = calls.seen[-1]
        return name == "moe_mlp" and args[-3]  # keep_pre

    assert keeps()
    with torch.no_grad():
        assert not keeps()
    with torch.inference_mode():
        assert not keeps()
    operands = {name: tensor.detach() for name, tensor in operands.items()}
    assert not keeps()
    operands["b_out"].requires_grad_()
    assert keeps()


def test_operator_without_its_pre_activation_refuses_backward(make):
    args = list(SAMPLES["moe_mlp"](make)[0])
    args[-3] = False
    y, _ = torch.ops.moe_ops.moe_mlp(*args)
    with pytest.raises(RuntimeError, match="keep_pre=True"):
        y.sum().backward()


def test_integer_outputs_carry_no_gradient(make):
    result = moe_ops.route(make(T, E), K, stats=True)
    assert result.weights.requires_grad and result.mean_prob.requires_grad and result.logsumexp.requires_grad
    assert not result.experts.requires_grad and not result.counts.requires_grad
    assert moe_ops.route(make(T, E, grad=False), K, selection_bias=make(E))[0].requires_grad is False


@pytest.mark.parametrize("rows", (1, 13, 40, 200))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_weight_gradients_are_added_in_any_dtype(dtype, rows, device, instruction_set):
    """What stands in the output and the sum are added in float32 and rounded once; without rows it stays."""
    offsets = offsets_of([rows, 0, rows // 2]).to(device)
    grad, a = (integers(rows + rows // 2, n, seed=n).to(device, torch.bfloat16) for n in (200, 270))
    sums = torch.ops.moe_ops.grouped_gemm_weight_grad(grad, a, offsets, None, 1, torch.float32, False)
    before = randn(3, 200, 270, dtype=dtype).to(device)
    added = before.clone()
    torch.ops.moe_ops.grouped_gemm_weight_grad_(added, grad, a, offsets, None, 1, False)
    assert torch.equal(added, (before.float() + sums).to(dtype))
    assert torch.equal(added[1], before[1])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_main_grad_accumulates(dtype, device):
    make = Maker(device, dtype, grad=True)
    plan, a, w = make.plan(), make(T, H), make(E, INNER, H)
    moe_ops.grouped_gemm(a, w, plan.offsets, gather=plan).sum().backward()
    expected, grad_a = w.grad, a.grad
    a.grad = w.grad = None
    w.main_grad = torch.ones(E, INNER, H, device=device)
    moe_ops.grouped_gemm(a, w, plan.offsets, gather=plan).sum().backward()
    assert w.grad is None
    assert torch.equal(a.grad, grad_a)
    torch.testing.assert_close(w.main_grad - 1, expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    moe_ops.grouped_gemm(a, w, plan.offsets, gather=plan).sum().backward()
    torch.testing.assert_close(w.main_grad - 1, 2 * expected.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_main_grad_under_autocast(weight_dtype, device):
    """Also where the weight is cast, and the operator sees a copy of it."""
    make = Maker(device, torch.float32, grad=True)
    plan, a, w = make.plan(), make(T, H), make(E, INNER, H, dtype=weight_dtype)
    results = []
    for main_grad in (None, torch.zeros(E, INNER, H, device=device)):
        w.main_grad, w.grad = main_grad, None
        with torch.autocast(device.type, dtype=torch.bfloat16):
            moe_ops.grouped_gemm(a, w, plan.offsets, gather=plan).float().sum().backward()
        results.append(w.grad if main_grad is None else main_grad)
    assert w.grad is None and results[1].count_nonzero() > 0
    torch.testing.assert_close(results[1].to(weight_dtype), results[0], rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("main_grad", "error", "text"),
    [
        ([1.0], TypeError, "must be a Tensor of shape [experts, n, k], got list"),
        (torch.zeros(E, H, INNER), ValueError, "must be of shape [experts, n, k] = [4, 3, 6], got [4, 6, 3]"),
        (torch.zeros(E, INNER, H).bfloat16(), TypeError, "must be of dtype float32, got bfloat16"),
        (torch.zeros(E, INNER, H, device="meta"), ValueError, "must be on the device of w (cpu), got meta"),
        (torch.zeros(E, H, INNER).transpose(1, 2), ValueError, "must be contiguous, got strides [18, 1, 3]"),
    ],
)
def test_a_wrong_main_grad_is_refused(main_grad, error, text):
    make = Maker(torch.device("cpu"), torch.float32)
    w = make(E, INNER, H)
    w.main_grad = main_grad
    with pytest.raises(error, match=re.escape(f"grouped_gemm: w.main_grad {text}")):
        moe_ops.grouped_gemm(make(T * K, H), w, make.plan().offsets)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_inference_mode_gives_the_same_values(name, make):
    args = SAMPLES[name](make)[0]
    operator = getattr(torch.ops.moe_ops, name)
    expected = operator(*args)
    with torch.inference_mode():
        got = operator(*args)
    for ours, theirs in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, expected)), strict=True):
        assert ours.is_inference() and torch.equal(ours, theirs)
