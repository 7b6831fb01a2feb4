"""plan: a stable counting sort of the slots by expert, against lists and loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_bitwise_equal, place
from cases import NAN, every_case, every_layout, input_layouts, integers, randn, seeded
from moe_ops import reference

POLICIES = ["position", "choice_first", "probability"]


def by_hand(experts, num_experts, capacity=None, drop_policy="position", weights=None):
    """The plan in lists: (offsets, row_slot, slot_row, counts)."""
    top_k = experts.shape[1]
    ids = experts.flatten().tolist()
    priority = list(range(len(ids)))
    if drop_policy == "choice_first":
        priority.sort(key=lambda slot: (slot % top_k, slot // top_k))
    elif drop_policy == "probability":
        w = weights.flatten().tolist()
        priority.sort(key=lambda slot: (not math.isnan(w[slot]), 0 if math.isnan(w[slot]) else -w[slot], slot))
    kept = {e: [] for e in range(num_experts)}
    for slot in priority:
        mine = kept.get(ids[slot])
        if mine is not None and (capacity is None or len(mine) < capacity):
            mine.append(slot)
    row_slot = [slot for e in range(num_experts) for slot in sorted(kept[e])]
    slot_row = [-1] * len(ids)
    for row, slot in enumerate(row_slot):
        slot_row[slot] = row
    row_slot += [slot for slot in range(len(ids)) if slot_row[slot] < 0]
    counts = [len(kept[e]) for e in range(num_experts)]
    offsets = [sum(counts[:e]) for e in range(num_experts + 1)]
    return offsets, row_slot, slot_row, counts


def assert_plan(ours, expected):
    for name, tensor, values in zip(ours._fields, ours, expected, strict=True):
        assert tensor.dtype == torch.int32, name
        assert tensor.flatten().tolist() == values, name


@every_case
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("capacity", [None, 0, 1, 3, 10**10])
def test_every_case_and_policy(case, dtype, policy, capacity, device):
    ids = case.ids(dtype)
    weights = integers(*ids.shape, seed=3)  # many ties
    ours = moe_ops.plan(
        place(ids, device), case.experts, capacity=capacity, drop_policy=policy, weights=place(weights, device)
    )
    assert_plan(ours, by_hand(ids, case.experts, capacity, policy, weights))
    assert ours.slot_row.shape == ids.shape


def test_the_reference_agrees_with_lists():
    for policy in POLICIES:
        ids = torch.randint(-1, 7, (50, 3), generator=seeded())
        weights = integers(50, 3)
        ours = reference.plan(ids, 6, capacity=9, drop_policy=policy, weights=weights)
        assert_plan(ours, by_hand(ids, 6, 9, policy, weights))


def test_ids_are_not_cut_to_32_bits(device):
    """2**32 + 3 is no expert, though its low half is 3."""
    ids = torch.tensor([[2**32 + 3, 3], [-(2**32), 2**63 - 1], [2**31, 0]])
    assert_plan(moe_ops.plan(place(ids, device), 4), by_hand(ids, 4))


def test_minus_one_sorts_last_not_first(device):
    ids = torch.tensor([[-1, 0], [0, -1]], dtype=torch.int32)
    plan = moe_ops.plan(place(ids, device), 2)
    assert plan.row_slot.tolist() == [1, 2, 0, 3]
    assert plan.offsets.tolist() == [0, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_probability_order(dtype, device):
    """NaN is the highest, equal weights go by slot, -0.0 equals 0.0; any float dtype."""
    weights = torch.tensor([[0.0, 0.5], [-0.0, NAN], [0.0, 0.5], [0.5, -1.0]], dtype=dtype)
    ids = torch.zeros(4, 2, dtype=torch.int32)
    for capacity in range(9):
        ours = moe_ops.plan(
            place(ids, device), 1, capacity=capacity, drop_policy="probability", weights=place(weights, device)
        )
        assert_plan(ours, by_hand(ids, 1, capacity, "probability", weights))


@pytest.mark.float64
def test_probability_compares_float64_weights_exactly(device):
    weights = torch.tensor([[1.0, 1.0 + 2**-50]], dtype=torch.float64)
    ids = torch.zeros(1, 2, dtype=torch.int32)
    ours = moe_ops.plan(place(ids, device), 1, capacity=1, drop_policy="probability", weights=place(weights, device))
    assert ours.slot_row.tolist() == [[-1, 0]]


@every_layout
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layouts(layout, dtype, device):
    ids = torch.randint(-1, 8, (33, 3), generator=seeded()).to(dtype)
    weights = randn(33, 3)
    ours = moe_ops.plan(
        layout(place(ids, device)), 8, capacity=9, drop_policy="probability", weights=layout(place(weights, device))
    )
    assert_plan(ours, by_hand(ids, 8, 9, "probability", weights))


def test_expanded_ids(device):
    ids = torch.tensor([[4, 1, 3]], dtype=torch.int32)
    ours = moe_ops.plan(place(ids, device).expand(7, 3), 6)
    assert_plan(ours, by_hand(ids.expand(7, 3), 6))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens, experts, top_k", [(40_000, 60, 3), (5_000, 1000, 8), (100_003, 1, 1)])
def test_any_number_of_threads(policy, tokens, experts, top_k, device, threads):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=seeded()).int()
    weights = torch.rand(tokens, top_k, generator=seeded(1))
    capacity = tokens * top_k // experts
    expected = reference.plan(ids, experts, capacity=capacity, drop_policy=policy, weights=weights)
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        ours = moe_ops.plan(
            place(ids, device), experts, capacity=capacity, drop_policy=policy, weights=place(weights, device)
        )
        for name, a, b in zip(ours._fields, ours, expected, strict=True):
            assert_bitwise_equal(a, b, f"{name} with {count} threads")


@pytest.mark.parametrize(
    "tokens, policy, capacity, expected",
    [
        (1365, "probability", 9, 1),  # 4095 slots: one block does everything
        (1365, "choice_first", 9, 1),
        (1366, "position", None, 3),
        (1366, "position", 9, 3),
        (1366, "choice_first", 9, 6),
        (1366, "probability", 9, 7),
        (1366, "probability", 1366 * 3, 3),  # no limit
        (0, "position", None, 1),
    ],
)
def test_launches(tokens, policy, capacity, expected, device, launches):
    ids, weights = torch.randint(0, 60, (tokens, 3), generator=seeded()), torch.rand(tokens, 3, generator=seeded(1))
    before = launches()
    moe_ops.plan(place(ids, device), 60, capacity=capacity, drop_policy=policy, weights=place(weights, device))
    assert launches() - before == expected


def test_row_token_and_pytree(device):
    ids = torch.tensor([[1, 0, 2], [2, 1, 0]], dtype=torch.int32)
    plan = moe_ops.plan(place(ids, device), 3)
    assert isinstance(plan, moe_ops.Plan)
    assert plan.row_token.tolist() == [0, 1, 0, 1, 0, 1]
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    assert len(leaves) == 4 and isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), moe_ops.Plan)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data())
def test_property(data):
    tokens, top_k = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 5))
    experts = data.draw(st.integers(1, 12))
    id_of = st.integers(-2, experts + 1) | st.sampled_from([-(2**31), 2**31 - 1])
    ids = torch.tensor(data.draw(st.lists(id_of, min_size=tokens * top_k, max_size=tokens * top_k)), dtype=torch.int32)
    ids = ids.view(tokens, top_k)
    grade = st.sampled_from([0.0, -0.0, 0.25, 1.0, NAN, float("inf"), -float("inf")])
    grades = data.draw(st.lists(grade, min_size=tokens * top_k, max_size=tokens * top_k))
    weights = torch.tensor(grades, dtype=torch.float32).view(tokens, top_k)
    capacity = data.draw(st.none() | st.integers(0, 9))
    policy = data.draw(st.sampled_from(POLICIES))
    ids, weights = data.draw(input_layouts)(ids), data.draw(input_layouts)(weights)
    ours = moe_ops.plan(ids, experts, capacity=capacity, drop_policy=policy, weights=weights)
    assert_plan(ours, by_hand(ids, experts, capacity, policy, weights))
