"""combine: the weighted sum of each token's rows; gradients of rows and of route weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_bitwise_equal, compare, place
from calls import combine
from cases import (
    DTYPES,
    NAN,
    constant,
    crowded,
    distinct,
    every_case,
    every_dtype,
    every_layout,
    input_layouts,
    integers,
    layouts,
    powers,
    randn,
    same_rows,
    seeded,
    some_dropped,
)


@every_case
@every_dtype
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients(case, dtype, weighted, device, instruction_set):
    ids = case.ids()
    tensors = {"rows": integers(ids.numel(), case.hidden, dtype=dtype)}
    if weighted:
        tensors["weights"] = powers(*ids.shape)
    for options in ({}, {"capacity": 2}):
        compare(combine(ids, case.experts, **options), tensors, device, tuple(tensors), exact=True)


@every_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_any_dtype(dtype, weight_dtype, device, instruction_set):
    ids = some_dropped(30, 7, 3)
    tensors = {"rows": randn(90, 37, dtype=dtype), "weights": torch.rand(30, 3, generator=seeded()).to(weight_dtype)}
    if torch.float64 in (dtype, weight_dtype) and dtype != weight_dtype:
        tensors = {"rows": integers(90, 37, dtype=dtype), "weights": powers(30, 3, dtype=weight_dtype)}
        compare(combine(ids, 7), tensors, device, ("rows", "weights"), exact=True)
    else:
        out = compare(combine(ids, 7), tensors, device, ("rows", "weights"))
        assert out["result"].dtype == dtype and out["grad weights"].dtype == weight_dtype


@pytest.mark.parametrize("hidden", [1, 2, 3, 15, 16, 17, 64, 255, 1030])
@pytest.mark.parametrize("top_k", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths(hidden, top_k, dtype, device, instruction_set):
    ids = distinct(40, 16, top_k)
    tensors = {"rows": randn(40 * top_k, hidden, dtype=dtype), "weights": torch.rand(40, top_k, generator=seeded())}
    compare(combine(ids, 16), tensors, device, ("rows", "weights"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_between(dtype, device, instruction_set):
    """A running sum in a low dtype would lose every small term."""
    top_k = 33
    ids = distinct(3, 40, top_k)
    plan = moe_ops.plan(place(ids, device), 40)
    values = torch.full((3 * top_k, 4), 1.0, dtype=dtype)
    slots = plan.slot_row.cpu()
    values[slots[:, 0].long()] = 2048.0
    y = moe_ops.combine(place(values, device), None, plan)
    assert_bitwise_equal(y, torch.full((3, 4), 2048.0 + top_k - 1).to(dtype))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("hidden", [1, 37])
def test_sums_go_in_the_order_of_k(hidden, weighted, device, instruction_set):
    """The other way round the 1 is lost beside 1e8."""
    plan = moe_ops.plan(place(torch.tensor([[2, 0, 1]]), device), 3)
    by_choice = torch.tensor([1e8, -1e8, 1.0])[:, None].expand(3, hidden)
    rows = by_choice[plan.row_slot.cpu().long()]
    y = moe_ops.combine(place(rows, device), place(torch.ones(1, 3), device) if weighted else None, plan)
    assert y.tolist() == [[1.0] * hidden]


@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype, device, instruction_set):
    ids = some_dropped(12, 5, 2)
    tensors = {"rows": integers(24, 10, dtype=dtype), "weights": powers(12, 2)}
    moved = {name: layout(t) for name, t in tensors.items()}
    both = ("rows", "weights")
    plain = compare(combine(ids, 5), tensors, device, both, exact=True)
    ours = compare(combine(ids, 5), moved, device, both, exact=True, grad_layout=layout)
    for name in plain:
        assert_bitwise_equal(ours[name], plain[name], name)


@pytest.mark.parametrize("expand", [same_rows, constant])
def test_expanded_inputs_and_gradient(expand, device, instruction_set):
    ids = some_dropped(12, 5, 2)
    tensors = {"rows": expand(integers(24, 10)), "weights": expand(powers(12, 2))}
    gradients = {"result": expand(integers(12, 10, seed=1).double())}
    compare(combine(ids, 5), tensors, device, tuple(tensors), exact=True, gradients=gradients, grad_layout=expand)


def test_dropped_slots_are_never_read(device, instruction_set):
    """NaN in a dropped slot's row or weight reaches neither the sum nor any gradient."""
    ids = torch.tensor([[0, -1], [9, 1], [-1, -1]], dtype=torch.int32)
    plan = moe_ops.plan(place(ids, device), 2)
    rows = torch.full((6, 4), NAN)
    rows[:2] = torch.tensor([[1.0], [2.0]])
    weights = torch.tensor([[0.5, NAN], [NAN, 0.25], [NAN, NAN]])
    rows, weights = place(rows, device).requires_grad_(), place(weights, device).requires_grad_()
    y = moe_ops.combine(rows, weights, plan)
    assert y.tolist() == [[0.5] * 4, [0.5] * 4, [0.0] * 4]
    y.backward(torch.ones_like(y))
    assert rows.grad[:, 0].tolist() == [0.5, 0.25, 0.0, 0.0, 0.0, 0.0]
    assert weights.grad.tolist() == [[4.0, 0.0], [0.0, 8.0], [0.0, 0.0]]


@pytest.mark.parametrize("needs", [("rows",), ("weights",)])
def test_each_gradient_alone(needs, device, instruction_set):
    ids = some_dropped(20, 5, 2)
    tensors = {"rows": integers(40, 10), "weights": powers(20, 2)}
    out = compare(combine(ids, 5), tensors, device, needs, exact=True)
    assert [name for name in out if name.startswith("grad")] == [f"grad {needs[0]}"]


def test_expert_choice_plan(device):
    """Slots [T, E], R = E * capacity rows, a token may have no row at all."""
    chosen = torch.tensor([[2, 0], [2, 3], [0, 2]])  # [E, C] tokens; token 1 is chosen by none
    row_slot = (chosen * 3 + torch.arange(3)[:, None]).flatten()
    slot_row = torch.full((15,), -1)
    slot_row[row_slot] = torch.arange(6)
    counts = torch.full((3,), 2)
    plan = moe_ops.Plan(torch.tensor([0, 2, 4, 6]).int(), row_slot.int(), slot_row.view(5, 3).int(), counts.int())

    def call(api, rows, weights):
        return api.combine(rows, weights, moe_ops.Plan(*(place(t, rows.device) for t in plan)))

    tensors = {"rows": integers(6, 4), "weights": powers(5, 3)}
    out = compare(call, tensors, device, ("rows", "weights"), exact=True)
    assert out["result"][[1, 4]].count_nonzero() == 0


def test_launches(device, launches):
    plan = moe_ops.plan(place(some_dropped(20, 5, 2), device), 5)
    rows, weights = place(randn(40, 10), device).requires_grad_(), place(powers(20, 2), device).requires_grad_()
    before = launches()
    y = moe_ops.combine(rows, weights, plan)
    assert launches() - before == 1
    torch.autograd.backward(y, torch.ones_like(y))
    assert launches() - before == 2


def test_any_number_of_threads_and_run_to_run(device, threads, instruction_set):
    ids = crowded(3000, 40, 4)
    tensors = {
        "rows": randn(12000, 67, dtype=torch.bfloat16),
        "weights": torch.rand(3000, 4, generator=seeded()),
    }
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        results.append(compare(combine(ids, 40), tensors, device, ("rows", "weights")))
    for other in results[1:]:
        for name in other:
            assert_bitwise_equal(other[name], results[0][name], name)


def test_a_token_does_not_depend_on_the_others(device, instruction_set):
    ids = distinct(64, 8, 3)
    rows, weights = randn(192, 33), torch.rand(64, 3, generator=seeded())
    plan = moe_ops.plan(place(ids, device), 8)
    y = moe_ops.combine(place(rows, device), place(weights, device), plan)
    for token in (0, 17, 63):
        alone = moe_ops.plan(place(ids[token : token + 1], device), 8)
        mine = rows[plan.slot_row.cpu()[token].long()]  # [K, H] by choice
        by_row = mine[alone.row_slot.cpu().long()]
        part = moe_ops.combine(place(by_row, device), place(weights[token : token + 1], device), alone)
        assert_bitwise_equal(part[0], y[token])


@settings(deadline=None, max_examples=100, derandomize=True)
@given(data=st.data())
def test_property(data):
    tokens, top_k = data.draw(st.integers(0, 30)), data.draw(st.integers(1, 9))
    experts, hidden = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 70))
    seed = data.draw(st.integers(0, 1000))
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=seeded(seed))
    capacity = data.draw(st.none() | st.integers(0, 8))
    tensors = {"rows": integers(tokens * top_k, hidden, dtype=data.draw(st.sampled_from(DTYPES)), seed=seed)}
    if data.draw(st.booleans()):
        weight_dtype = data.draw(st.sampled_from(DTYPES))
        tensors["weights"] = powers(tokens, top_k, dtype=weight_dtype, seed=seed)
    tensors = {name: data.draw(input_layouts)(t) for name, t in tensors.items()}
    call, cpu = combine(data.draw(input_layouts)(ids), experts, capacity=capacity), torch.device("cpu")
    compare(call, tensors, cpu, tuple(tensors), exact=True, grad_layout=data.draw(layouts))
