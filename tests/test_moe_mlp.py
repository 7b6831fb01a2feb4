"""moe_mlp: values and every gradient against the reference, over options, dtypes, cases and layouts."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_as_accurate, assert_bitwise_equal, compare, place
from calls import GPT_OSS, MLP, exact_tensors, moe_mlp, random_tensors
from cases import (
    DTYPES,
    INF,
    LOW,
    NAN,
    WIDEST,
    Case,
    constant,
    every_case,
    every_dtype,
    every_layout,
    input_layouts,
    integers,
    layouts,
    randn,
    same_rows,
    seeded,
    some_dropped,
)
from moe_ops import reference

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu", "relu2"]


MEDIUM = Case("medium", tokens=50, experts=6, top_k=3, hidden=48, inner=40, choose=some_dropped)


@every_case
@every_dtype
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_every_case(case, dtype, weight_on, device, instruction_set):
    call = moe_mlp(case.ids(), activation="relu", weight_on=weight_on)
    tensors = exact_tensors(case, dtype)
    compare(call, tensors, device, MLP, exact=dtype not in LOW)


@every_dtype
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, gated, dtype, device, instruction_set):
    call = moe_mlp(MEDIUM.ids(), activation=activation, gated=gated)
    gradients = {"result": randn(50, 48, seed=9)}
    compare(call, random_tensors(MEDIUM, dtype, gated), device, MLP, gradients=gradients)


OPTIONS = {
    "interleaved": {"layout": "interleaved"},
    "alpha": {"alpha": 1.702},
    "limit": {"limit": 1.0},
    "limit_plain": {"limit": 0.5, "gated": False},
    "limit_gelu": {"limit": 0.7, "activation": "gelu"},
    "up_offset": {"up_offset": 1.0},
    "gpt_oss": GPT_OSS,
    "gpt_oss_small_limit": GPT_OSS | {"limit": 0.8},
    "input": {"weight_on": "input"},
    "input_gpt_oss": GPT_OSS | {"weight_on": "input", "limit": 1.0},
    "input_plain": {"weight_on": "input", "gated": False, "activation": "relu2"},
    "capacity": {"capacity": 11},
    "capacity_choice_first": {"capacity": 11, "drop_policy": "choice_first"},
    "capacity_probability": {"capacity": 11, "drop_policy": "probability"},
    "capacity_input": {"capacity": 11, "drop_policy": "probability", "weight_on": "input"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("biased", [True, False])
def test_options(options, biased, dtype, device, instruction_set):
    tensors = random_tensors(MEDIUM, dtype, options.get("gated", True))
    if not biased:
        del tensors["b_in"], tensors["b_out"]
    compare(moe_mlp(MEDIUM.ids(), **options), tensors, device, tuple(tensors))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_float32_weights_under_low_tokens(dtype, weight_on, device, instruction_set):
    tensors = random_tensors(MEDIUM, dtype, weight_dtype=torch.float32)
    out = compare(moe_mlp(MEDIUM.ids(), weight_on=weight_on), tensors, device, MLP)
    assert out["result"].dtype == dtype
    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert out[f"grad {name}"].dtype == torch.float32, name


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_route_weights_of_any_dtype(weight_dtype, device, instruction_set):
    tensors = exact_tensors(MEDIUM)
    tensors["weights"] = tensors["weights"].to(weight_dtype)
    out = compare(moe_mlp(MEDIUM.ids(), activation="relu"), tensors, device, MLP, exact=weight_dtype not in LOW)
    assert out["grad weights"].dtype == weight_dtype


@pytest.mark.parametrize("tokens, hidden, inner", [(130, 130, 70), (33, 65, 64), (7, 257, 129), (200, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_edges(tokens, hidden, inner, dtype, device, instruction_set):
    case = Case("", tokens=tokens, experts=3, top_k=2, hidden=hidden, inner=inner)
    gradients = {"result": randn(tokens, hidden, seed=9)}
    compare(moe_mlp(case.ids()), random_tensors(case, dtype), device, MLP, gradients=gradients)


@pytest.mark.parametrize("needs", [n for size in range(1, 7) for n in combinations(MLP, size)], ids="+".join)
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_every_subset_of_gradients(needs, weight_on, device):
    case = Case("", tokens=7, experts=3, hidden=5, inner=4, choose=some_dropped)
    call = moe_mlp(case.ids(), activation="relu", weight_on=weight_on)
    compare(call, exact_tensors(case), device, needs, exact=True)


@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_layouts(layout, dtype, weight_on, device, instruction_set):
    case = Case("", tokens=12, experts=5, hidden=10, inner=6, choose=some_dropped)
    tensors = exact_tensors(case, dtype)
    call = moe_mlp(case.ids(), activation="relu", weight_on=weight_on)
    plain = compare(call, tensors, device, MLP, exact=True)
    moved = {name: layout(t) for name, t in tensors.items()}
    ours = compare(call, moved, device, MLP, exact=True, grad_layout=layout)
    for name in plain:
        assert_bitwise_equal(ours[name], plain[name], name)


@pytest.mark.parametrize("layout", [lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)], ids=["transposed"])
@pytest.mark.parametrize("options", [{}, GPT_OSS, {"weight_on": "input"}], ids=["concatenated", "gpt_oss", "input"])
@pytest.mark.parametrize("dtype", LOW)
def test_layouts_of_low_dtypes(layout, options, dtype, device, instruction_set):
    """As transformers' transposed experts lie in memory."""
    tensors = random_tensors(MEDIUM, dtype)
    plain = compare(moe_mlp(MEDIUM.ids(), **options), tensors, device, MLP)
    moved = tensors | {name: layout(tensors[name]) for name in ("w_in", "w_out", "x")}
    ours = compare(moe_mlp(MEDIUM.ids(), **options), moved, device, MLP)
    for name in plain:
        assert_bitwise_equal(ours[name], plain[name], name)


@every_dtype
@pytest.mark.parametrize("inner", [5, 13, 200])  # 13: more than half a vector of AVX-512
@pytest.mark.parametrize("tokens", [2, 9, 60])
def test_interleaved_has_the_bits_of_concatenated(tokens, inner, dtype, device, instruction_set):
    """But for x's gradient, which is a sum over gates and ups in their order."""
    case = Case("", tokens=tokens, experts=2, top_k=1, hidden=37, inner=inner)
    concatenated = {n: place(t, device) for n, t in random_tensors(case, dtype).items()}
    order = torch.arange(2 * inner, device=device).view(2, inner).t().flatten()  # 0, inner, 1, inner + 1, ...
    interleaved = concatenated | {"w_in": concatenated["w_in"][:, order], "b_in": concatenated["b_in"][:, order]}
    results = []
    for layout, tensors in (("concatenated", concatenated), ("interleaved", interleaved)):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        y = moe_mlp(case.ids(), layout=layout)(moe_ops, **leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), place(randn(tokens, 37, dtype=dtype, seed=9), device))
        results.append({"y": y} | dict(zip(leaves, grads, strict=True)))
    for name in ("w_in", "b_in"):
        results[0][name] = results[0][name][:, order]
    for name in results[0].keys() - {"x"}:
        assert_bitwise_equal(results[1][name], results[0][name], name)


@pytest.mark.parametrize("expand", [same_rows, constant])
def test_expanded_inputs_and_gradient(expand, device, instruction_set):
    case = Case("", tokens=12, experts=3, hidden=10, inner=6, choose=some_dropped)
    tensors = {name: expand(t) for name, t in exact_tensors(case).items()}
    gradients = {"result": expand(integers(12, 10, seed=9).double())}
    call = moe_mlp(case.ids(), activation="relu")
    compare(call, tensors, device, MLP, exact=True, gradients=gradients, grad_layout=expand)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_a_given_plan_supersedes_experts(weight_on, device):
    tensors = exact_tensors(MEDIUM)
    ids, other = MEDIUM.ids(), MEDIUM.ids().flip(0)

    def call(api, x, weights, w_in, w_out, b_in, b_out):
        plan = api.plan(place(ids, x.device), MEDIUM.experts, capacity=9)
        options = {"b_in": b_in, "b_out": b_out, "plan": plan, "activation": "relu", "weight_on": weight_on}
        return api.moe_mlp(x, weights, place(other, x.device), w_in, w_out, **options)

    ours = compare(call, tensors, device, MLP, exact=True)
    call = moe_mlp(ids, activation="relu", weight_on=weight_on, capacity=9)
    assert_bitwise_equal(compare(call, tensors, device, exact=True)["result"], ours["result"])


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_nan_stays_where_it_belongs(weight_on, device, instruction_set):
    """NaN in a token, in an unused expert or in a dropped slot's weight reaches no other token, and no other expert."""
    ids = torch.tensor([[0, 1], [1, 2], [2, -1], [0, 2], [9, -1]], dtype=torch.int32)  # expert 3 is not used
    case = Case("", tokens=5, experts=4, hidden=9, inner=6)
    tensors = random_tensors(case)
    clean = compare(moe_mlp(ids, weight_on=weight_on), tensors, device)["result"]
    tensors["x"][0] = NAN
    tensors["weights"][2, 1] = tensors["weights"][4] = NAN
    for name in ("w_in", "w_out", "b_in", "b_out"):
        tensors[name][3] = NAN
    leaves = {name: place(t, device).requires_grad_() for name, t in tensors.items()}
    y = moe_mlp(ids, weight_on=weight_on)(moe_ops, **leaves)
    assert y[0].isnan().all() and y[4].count_nonzero() == 0
    assert_bitwise_equal(y[1:], clean[1:])
    y[1:].sum().backward()
    for name in ("w_in", "w_out", "b_in", "b_out"):
        grad = leaves[name].grad
        assert grad[3].count_nonzero() == 0 and grad[2].isfinite().all(), name
    grad = leaves["weights"].grad
    assert grad[2, 1] == 0 and grad[4].count_nonzero() == 0 and grad[1:].isfinite().all()
    assert leaves["x"].grad[1:].isfinite().all() and leaves["x"].grad[4].count_nonzero() == 0


def test_gate_and_up_are_not_rounded_before_their_product(device, instruction_set):
    """257 * 3 is 772 in bfloat16; a gate that was rounded, to 256, would give 768."""
    x = torch.ones(1, 257, dtype=torch.bfloat16)
    w_in = torch.ones(1, 2, 257, dtype=torch.bfloat16)
    w_in[0, 1, 3:] = 0
    w_out, one = torch.ones(1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1)
    tensors = (place(t, device) for t in (x, one, torch.zeros(1, 1, dtype=torch.int32), w_in))
    w_out = place(w_out.expand(1, 257, 1), device)
    assert (moe_ops.moe_mlp(*tensors, w_out, activation="relu") == 772).all()


@pytest.mark.parametrize("activation, gate", [("relu", -1.0), ("relu2", -1.0), ("relu", 0.0), ("silu", 3.0)])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("value", [INF, -INF])
def test_a_dead_gate_takes_no_gradient_of_an_infinite_up(activation, gate, layout, value, device, instruction_set):
    """0 * inf is NaN in y, as in torch; the gate's gradient is 0 there, whether relu or the limit cut it off."""
    ids, tensors = torch.zeros(1, 1, dtype=torch.int32), exact_tensors(Case("", tokens=1, experts=1, top_k=1))
    options = {"activation": activation, "layout": layout} | ({"limit": 2.0} if activation == "silu" else {})
    tensors["w_in"].zero_()
    by_half = torch.tensor([[gate] * 8, [value] * 8])  # gates, ups
    tensors["b_in"] = (by_half.t() if layout == "interleaved" else by_half).reshape(1, 16)
    grads = []
    for api in (moe_ops, reference):
        leaves = {n: place(t, device).requires_grad_() for n, t in tensors.items()}
        moe_mlp(ids, **options)(api, **leaves).sum().backward()
        grads.append(leaves["b_in"].grad)
    assert_bitwise_equal(grads[0], grads[1] + 0.0)
    assert (grads[0].view(8, 2)[:, 0] if layout == "interleaved" else grads[0][0, :8]).count_nonzero() == 0


@settings(deadline=None, max_examples=120, derandomize=True)
@given(data=st.data())
def test_property(data):
    case = Case(
        "",
        tokens=data.draw(st.integers(0, 40)),
        experts=data.draw(st.integers(1, 7)),
        top_k=data.draw(st.integers(1, 4)),
        hidden=data.draw(st.integers(1, 20)),
        inner=data.draw(st.integers(1, 20)),
    )
    seed, gated = data.draw(st.integers(0, 1000)), data.draw(st.booleans())
    ids = torch.randint(-1, case.experts + 1, (case.tokens, case.top_k), generator=seeded(seed))
    tensors = exact_tensors(case, data.draw(st.sampled_from([torch.float32, WIDEST])), gated, seed)
    for name in ("b_in", "b_out"):
        if data.draw(st.booleans()):
            del tensors[name]
    options = {
        "activation": "relu",
        "gated": gated,
        "layout": data.draw(st.sampled_from(["concatenated", "interleaved"])),
        "limit": data.draw(st.none() | st.integers(1, 4).map(float)),
        "up_offset": data.draw(st.sampled_from([0.0, 1.0])) if gated else 0.0,
        "weight_on": data.draw(st.sampled_from(["output", "input"])),
        "capacity": data.draw(st.none() | st.integers(0, 20)),
        "drop_policy": data.draw(st.sampled_from(["position", "choice_first", "probability"])),
    }
    tensors = {name: data.draw(input_layouts)(t) for name, t in tensors.items()}
    call, cpu = moe_mlp(data.draw(input_layouts)(ids), **options), torch.device("cpu")
    compare(call, tensors, cpu, tuple(tensors), exact=True, grad_layout=data.draw(layouts))


def test_the_reference_itself():
    """Token by token, expert by expert, one matrix-vector product at a time."""
    case = Case("", tokens=6, experts=4, top_k=3, hidden=5, inner=3, choose=some_dropped)
    ids, t = case.ids(), random_tensors(case, torch.float64)
    for weight_on in ("output", "input"):
        ours = moe_mlp(ids, weight_on=weight_on, **GPT_OSS)(reference, **t)
        expected = torch.zeros(6, 5, dtype=torch.float64)
        for token, k in torch.cartesian_prod(torch.arange(6), torch.arange(3)).tolist():
            e, weight = ids[token, k].item(), t["weights"][token, k].double()
            if e >= 0:
                x = t["x"][token] * (weight if weight_on == "input" else 1)
                pre = t["w_in"][e] @ x + t["b_in"][e]
                gate, up = pre[0::2].clamp(max=7), pre[1::2].clamp(-7, 7)
                row = t["w_out"][e] @ (gate * (1.702 * gate).sigmoid() * (up + 1)) + t["b_out"][e]
                expected[token] += row * (1 if weight_on == "input" else weight)
        assert_as_accurate(ours, expected, expected)
