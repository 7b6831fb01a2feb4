"""dispatch is plan, then permute; combine takes its plan back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_bitwise_equal, compare, place
from cases import DTYPES, every_case, every_dtype, input_layouts, integers, layouts, powers, randn, seeded, some_dropped


def dispatch(ids, experts, **options):
    def call(api, x, weights=None):
        rows, plan = api.dispatch(x, place(ids, x.device), experts, weights=weights, **options)
        return {"rows": rows} | plan._asdict()

    return call


@every_case
@every_dtype
@pytest.mark.parametrize("capacity", [None, 2])
def test_values_plan_and_gradient(case, dtype, capacity, device):
    x = integers(case.tokens, case.hidden, dtype=dtype)
    compare(dispatch(case.ids(), case.experts, capacity=capacity), {"x": x}, device, ("x",), exact=True)


@pytest.mark.parametrize("policy", ["position", "choice_first", "probability"])
def test_drop_policies(policy, device):
    ids = some_dropped(30, 5, 3)
    tensors = {"x": integers(30, 8), "weights": powers(30, 3)}
    out = compare(dispatch(ids, 5, capacity=4, drop_policy=policy), tensors, device, ("x",), exact=True)
    assert out["counts"].max() == 4 and out["offsets"][-1] < (ids >= 0).sum(), "nothing was dropped"


@settings(deadline=None, max_examples=100, derandomize=True)
@given(data=st.data())
def test_property(data):
    tokens, top_k, experts = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    seed = data.draw(st.integers(0, 1000))
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=seeded(seed))
    x = integers(tokens, data.draw(st.integers(0, 40)), dtype=data.draw(st.sampled_from(DTYPES)), seed=seed)
    tensors = {"x": x, "weights": powers(tokens, top_k, seed=seed)}
    tensors = {name: data.draw(input_layouts)(t) for name, t in tensors.items()}
    options = {"capacity": data.draw(st.none() | st.integers(0, 8))}
    options["drop_policy"] = data.draw(st.sampled_from(["position", "choice_first", "probability"]))
    call, cpu = dispatch(data.draw(input_layouts)(ids), experts, **options), torch.device("cpu")
    compare(call, tensors, cpu, ("x",), exact=True, grad_layout=data.draw(layouts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_there_and_back(dtype, ids_dtype, device):
    """With weights that sum to one over what was kept, combine returns the tokens."""
    ids = torch.rand(40, 6, generator=seeded()).argsort(1)[:, :4].to(ids_dtype)
    x = place(randn(40, 33, dtype=dtype), device)
    rows, plan = moe_ops.dispatch(x, place(ids, device), 6, group=None)
    assert_bitwise_equal(moe_ops.combine(rows, place(torch.full((40, 4), 0.25), device), plan), x)


def test_offsets_are_those_of_grouped_mm(device):
    """The rows of each expert are where torch's own operator looks for them."""
    ids = torch.randint(0, 4, (32, 2), generator=seeded())
    x, w = randn(32, 16), randn(4, 24, 16, seed=1)
    rows, plan = moe_ops.dispatch(place(x, device), place(ids, device), 4)
    theirs = torch.nn.functional.grouped_mm(rows.cpu(), w.transpose(1, 2), offs=plan.offsets[1:].cpu())
    expected = torch.stack([w[e] @ x[t] for e in range(4) for t in ((ids == e).nonzero()[:, 0]).tolist()])
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
