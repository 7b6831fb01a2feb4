"""moe_mlp under no_grad is one operator, bitwise equal to plan and moe_mlp."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import moe_ops
from accuracy import assert_bitwise_equal, place
from calls import GPT_OSS, Calls, moe_mlp, random_tensors
from cases import DEVICE, DTYPES, Case, every_dtype, out_of_range, some_dropped
from samples import SAMPLES, Maker

PREFILL = Case("prefill", tokens=50, experts=6, top_k=3, hidden=48, inner=40, choose=some_dropped)
DECODING = Case("decoding", tokens=2, experts=9, top_k=3, hidden=70, inner=33, choose=out_of_range)
OPTIONS = {
    "default": {},
    "plain": {"gated": False, "activation": "relu2"},
    "gpt_oss": GPT_OSS,
    "input": {"weight_on": "input", "limit": 0.5},
    "probability": {"drop_policy": "probability"},  # says nothing where there is no capacity
}


def called(function):
    """What it returns, and the operators it calls."""
    with Calls() as calls:
        result = function()
    return result, [name for name, _ in calls.seen]


@every_dtype
@pytest.mark.parametrize("case", [PREFILL, DECODING], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_one_operator_with_the_bits_of_two(options, case, dtype, device, instruction_set):
    tensors = {n: place(t, device) for n, t in random_tensors(case, dtype, options.get("gated", True)).items()}
    for ids in (case.ids(), case.ids().long()):
        call = moe_mlp(ids, **options)
        expected, two = called(lambda call=call: call(moe_ops, **tensors))
        with torch.no_grad():
            y, one = called(lambda call=call: call(moe_ops, **tensors))
        assert (two, one) == (["plan", "moe_mlp"], ["moe_mlp_inference"])
        assert_bitwise_equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_float32_weights(dtype, device):
    """Operands that are copied first: ids and route weights with gaps, columns of x, weights whose rows are apart."""
    tensors = {n: place(t, device) for n, t in random_tensors(PREFILL, dtype, weight_dtype=torch.float32).items()}
    if dtype == torch.float64:
        tensors |= {n: t.double() for n, t in tensors.items() if n not in ("x", "weights")}
    ids, weights, x = place(PREFILL.ids(), device), tensors.pop("weights"), tensors.pop("x")
    w_in = tensors.pop("w_in")
    spread = ids.repeat_interleave(2, dim=1)[:, ::2], weights.repeat_interleave(2, dim=1)[:, ::2]
    apart = w_in.repeat_interleave(2, dim=2)[:, :, ::2]
    with torch.no_grad():
        expected = moe_ops.moe_mlp(x, weights, ids, w_in, **tensors)
        y, names = called(lambda: moe_ops.moe_mlp(x.t().contiguous().t(), spread[1], spread[0], apart, **tensors))
    assert names == ["moe_mlp_inference"]
    assert_bitwise_equal(y, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU packs")
@every_dtype
def test_packed_weights(dtype, device, switches):
    moe_ops.set_batch_invariant(True)
    tensors = random_tensors(PREFILL, dtype)
    packed = {name: moe_ops.prepack(tensors[name]) for name in ("w_in", "w_out")}
    with torch.no_grad():
        expected = moe_mlp(PREFILL.ids())(moe_ops, **tensors)
        for some in (packed, {"w_in": packed["w_in"]}, {"w_out": packed["w_out"]}):
            y, names = called(lambda some=some: moe_mlp(PREFILL.ids())(moe_ops, **(tensors | some)))
            assert names == ["moe_mlp_inference"]
            assert_bitwise_equal(y, expected)


def test_capacity_plan_and_autocast_take_the_general_path(device):
    tensors = {n: place(t, device) for n, t in random_tensors(PREFILL).items()}
    plan = moe_ops.plan(place(PREFILL.ids(), device), PREFILL.experts)
    with torch.no_grad():
        assert called(lambda: moe_mlp(PREFILL.ids(), capacity=7)(moe_ops, **tensors))[1] == ["plan", "moe_mlp"]
        assert called(lambda: moe_mlp(PREFILL.ids(), plan=plan)(moe_ops, **tensors))[1] == ["moe_mlp"]
        with torch.autocast(device.type, torch.bfloat16):
            y, names = called(lambda: moe_mlp(PREFILL.ids())(moe_ops, **tensors))
    assert names == ["plan", "moe_mlp"] and y.dtype == torch.bfloat16


def test_options_that_compare_equal_are_told_apart(device):
    """What was found of options is remembered: True == 1.0, and only one of them is an alpha."""
    tensors = {n: place(t, device) for n, t in random_tensors(PREFILL).items()}
    with torch.no_grad():
        moe_mlp(PREFILL.ids(), alpha=1.0, gated=True)(moe_ops, **tensors)
        with pytest.raises(TypeError, match="moe_mlp: alpha must be a number"):
            moe_mlp(PREFILL.ids(), alpha=True)(moe_ops, **tensors)
        with pytest.raises(TypeError, match="moe_mlp: gated must be True or False, got int 1"):
            moe_mlp(PREFILL.ids(), gated=1)(moe_ops, **tensors)
        with pytest.raises(TypeError, match=r"moe_mlp: layout must be one of .*, got list"):
            moe_mlp(PREFILL.ids(), layout=["concatenated"])(moe_ops, **tensors)


class Failing(Calls):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        super().__torch_dispatch__(func, types, args, kwargs)
        raise RuntimeError("not an argument's error")


def test_an_error_that_is_of_no_argument_comes_through(device):
    tensors = {n: place(t, device) for n, t in random_tensors(PREFILL).items()}
    ids = place(PREFILL.ids(), device)
    with torch.no_grad(), pytest.raises(RuntimeError, match="not an argument's error"), Failing() as calls:
        moe_ops.moe_mlp(experts=ids, **tensors)
    assert [name for name, _ in calls.seen] == ["moe_mlp_inference"]


def test_an_argument_s_error_stands_alone(device):
    """Without the operator's own, which was first."""
    tensors = {n: place(t, device) for n, t in random_tensors(PREFILL).items()}
    with torch.no_grad(), pytest.raises(ValueError, match="moe_mlp: weights must be of shape") as caught:
        moe_mlp(PREFILL.ids())(moe_ops, **(tensors | {"weights": tensors["weights"][1:]}))
    assert caught.value.__suppress_context__


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "moe_mlp" in str(func):
            self.recorded = torch.ones(1, requires_grad=True)
            with torch.enable_grad():
                self.recorded = self.recorded * 2
        return func(*args, **(kwargs or {}))


def test_overrides_of_torch_s_functions_keep_autograd(device):
    tensors = {n: place(t, device) for n, t in random_tensors(PREFILL).items()}
    with torch.no_grad(), Functions() as mode:
        _, names = called(lambda: moe_mlp(PREFILL.ids())(moe_ops, **tensors))
    assert names == ["plan", "moe_mlp"]
    assert mode.recorded.grad_fn is not None


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU packs")
def test_a_packed_weight_that_contradicts_itself_is_refused():
    tensors = random_tensors(PREFILL, torch.bfloat16)
    packed = moe_ops.prepack(tensors["w_in"])
    other = moe_ops.PackedWeight(packed.panels, packed.stand_in.float())
    elsewhere = moe_ops.PackedWeight(packed.panels.to("meta"), packed.stand_in)
    none = moe_ops.PackedWeight(None, packed.stand_in)
    for recording in (False, True):
        with torch.set_grad_enabled(recording):
            with pytest.raises(TypeError, match="moe_mlp: w_in, a PackedWeight, must have the dtype of x"):
                moe_mlp(PREFILL.ids())(moe_ops, **(tensors | {"w_in": other}))
            with pytest.raises(ValueError, match=r"moe_mlp: w_in\.panels must be on the device of x"):
                moe_mlp(PREFILL.ids())(moe_ops, **(tensors | {"w_in": elsewhere}))
            with pytest.raises(TypeError, match=r"PackedWeight: panels must be a Tensor of shape .*, got None"):
                moe_mlp(PREFILL.ids())(moe_ops, **(tensors | {"w_in": none}))


def test_operator_refuses_backward(device):
    for args in SAMPLES["moe_mlp_inference"](Maker(device, torch.float32, grad=True)):
        y = torch.ops.moe_ops.moe_mlp_inference(*args)
        with pytest.raises(RuntimeError, match="moe_ops::moe_mlp_inference has no gradient: it keeps nothing"):
            y.sum().backward()
