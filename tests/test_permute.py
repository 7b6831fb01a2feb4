"""permute: rows in expert order, bit for bit; its gradient adds the rows of each token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_bitwise_equal, compare, place
from calls import permute
from cases import (
    DTYPES,
    NAN,
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


@every_case
@every_dtype
def test_values_and_gradients(case, dtype, device, instruction_set):
    x = integers(case.tokens, case.hidden, dtype=dtype)
    compare(permute(case.ids(), case.experts), {"x": x}, device, ("x",), exact=True)
    compare(permute(case.ids(), case.experts, capacity=2), {"x": x}, device, ("x",), exact=True)


@pytest.mark.parametrize("hidden", [1, 2, 3, 8, 31, 64, 129, 1000])
@every_dtype
def test_widths(hidden, dtype, device, instruction_set):
    ids = some_dropped(40, 7, 3)
    x = randn(40, hidden, dtype=dtype)
    rows = moe_ops.permute(place(x, device), moe_ops.plan(place(ids, device), 7))
    assert_bitwise_equal(rows, reference.permute(x, reference.plan(ids, 7)))
    compare(permute(ids, 7), {"x": x}, device, ("x",))


@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype, device):
    ids = some_dropped(12, 5, 2)
    x = integers(12, 10, dtype=dtype)
    plain = compare(permute(ids, 5), {"x": x}, device, ("x",), exact=True)
    ours = compare(permute(ids, 5), {"x": layout(x)}, device, ("x",), exact=True, grad_layout=layout)
    for name in plain:
        assert_bitwise_equal(ours[name], plain[name], name)


@pytest.mark.parametrize("expand", [same_rows, constant])
def test_expanded_input_and_gradient(expand, device):
    ids = some_dropped(12, 5, 2)
    x = expand(integers(12, 10))
    gradient = expand(integers(24, 10, seed=1).double())
    compare(permute(ids, 5), {"x": x}, device, ("x",), exact=True, gradients={"result": gradient}, grad_layout=expand)


def test_dropped_rows_are_zero_and_take_no_gradient(device):
    ids = torch.tensor([[0, -1], [7, 1], [-1, -1]], dtype=torch.int32)
    x = torch.full((3, 5), 3.0)
    x[2] = NAN
    x = place(x, device).requires_grad_()
    plan = moe_ops.plan(place(ids, device), 2)
    rows = moe_ops.permute(x, plan)
    assert rows.tolist() == [[3.0] * 5] * 2 + [[0.0] * 5] * 4
    gradient = torch.ones_like(rows)
    gradient[2:] = NAN
    rows.backward(gradient)
    assert x.grad.tolist() == [[1.0] * 5, [1.0] * 5, [0.0] * 5]


def test_nan_stays_in_its_token(device):
    ids = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    x = torch.tensor([[NAN, 1.0], [2.0, float("inf")]])
    rows = moe_ops.permute(place(x, device), moe_ops.plan(place(ids, device), 2))
    assert_bitwise_equal(rows, x[[0, 1, 0, 1]])


@every_dtype
def test_expert_choice_plan(dtype, device, instruction_set):
    """Experts choose tokens: R = E * capacity rows, slots [T, E]."""
    tokens, experts, capacity = 10, 4, 3
    chosen = torch.rand(experts, tokens, generator=seeded()).argsort(1)[:, :capacity]  # [E, C] tokens
    row_slot = (chosen * experts + torch.arange(experts)[:, None]).flatten()
    slot_row = torch.full((tokens * experts,), -1)
    slot_row[row_slot] = torch.arange(len(row_slot))
    plan = moe_ops.Plan(
        (torch.arange(experts + 1) * capacity).int(),
        row_slot.int(),
        slot_row.view(tokens, experts).int(),
        torch.full((experts,), capacity).int(),
    )
    x = integers(tokens, 6, dtype=dtype)

    def call(api, x):
        return api.permute(x, moe_ops.Plan(*(place(t, x.device) for t in plan)))

    out = compare(call, {"x": x}, device, ("x",), exact=True)
    assert_bitwise_equal(out["result"], x[chosen.flatten()])


def test_launches(device, launches):
    """Dropped rows are cleared by the launch that moves the others."""
    plan = moe_ops.plan(place(some_dropped(40, 7, 3), device), 7)
    x = place(randn(40, 5), device)
    before = launches()
    moe_ops.permute(x, plan)
    assert launches() - before == 1


def test_any_number_of_threads(device, threads):
    ids = torch.randint(-1, 16, (4000, 4), generator=seeded())
    x = randn(4000, 33)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(compare(permute(ids, 16), {"x": x}, device, ("x",)))
    for other in results[1:]:
        for name in other:
            assert_bitwise_equal(other[name], results[0][name], name)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(data=st.data())
def test_property(data):
    tokens, top_k = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 4))
    experts, hidden = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 40))
    dtype = data.draw(st.sampled_from(DTYPES))
    seed = data.draw(st.integers(0, 1000))
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=seeded(seed))
    options = {"capacity": data.draw(st.none() | st.integers(0, 8))}
    options["drop_policy"] = data.draw(st.sampled_from(["position", "choice_first"]))
    x, cpu = data.draw(input_layouts)(integers(tokens, hidden, dtype=dtype, seed=seed)), torch.device("cpu")
    call = permute(data.draw(input_layouts)(ids), experts, **options)
    compare(call, {"x": x}, cpu, ("x",), exact=True, grad_layout=data.draw(layouts))
