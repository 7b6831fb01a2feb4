"""route: which experts, exactly; how much, by the accuracy law; statistics; gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops
from accuracy import assert_as_accurate, assert_bitwise_equal, compare, place
from cases import DTYPES, INF, LOGITS, NAN, constant, every_dtype, every_layout, integers, randn, same_rows, seeded
from moe_ops import reference

SCORES = ["softmax", "softmax_selected", "sigmoid", "sqrtsoftplus", "identity"]
every_score = pytest.mark.parametrize("score", SCORES)


def route(top_k, **options):
    """A call for compare: every output by name, counts and the like with stats."""

    def call(api, logits, **tensors):
        out = api.route(logits, top_k, **options, **tensors)
        return out._asdict() if options.get("stats") else {"weights": out[0], "experts": out[1]}

    return call


def by_hand(row, top_k):
    """The total order in Python: NaN first, then by value, then by id."""
    return sorted(range(len(row)), key=lambda e: (not math.isnan(row[e]), 0 if math.isnan(row[e]) else -row[e], e))[
        :top_k
    ]


SELECTIONS = {
    "logits": {},
    "bias": {"bias": True},
    "groups_max": {"groups": (4, 2), "group_score": "max"},
    "groups_top2": {"groups": (4, 2), "group_score": "top2_sum"},
    "groups_zero_bias": {"groups": (6, 3), "group_mask": "zero", "bias": True},
    "groups_of_one": {"groups": (24, 5)},
}
RENORMALIZE = {
    "none": {},
    "sum": {"renormalize": True, "eps": 1e-3},
    "clamp": {"renormalize": "clamp", "eps": 0.6},
    "pnorm": {"renormalize": "pnorm", "p": 2.0},
    "pnorm_1": {"renormalize": "pnorm"},
}


@every_score
@pytest.mark.parametrize("renormalize", RENORMALIZE.values(), ids=RENORMALIZE.keys())
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_options(score, renormalize, selection, device, instruction_set):
    """Everything at once, and each thing with each other; 24 experts."""
    tensors = {"logits": randn(60, 24), "expert_scale": torch.rand(24, generator=seeded(1)) + 0.5}
    if score == "identity":
        tensors["logits"] = tensors["logits"].abs()  # their sum is divided by
    selection = dict(selection)
    if selection.pop("bias", False):
        tensors["selection_bias"] = randn(24, seed=2, scale=0.1)
    segments = place(torch.randint(-1, 5, (60,), generator=seeded(3)), device)  # 4 is no segment
    options = {"stats": True, "segments": segments, "num_segments": 4, "scale": 1.5, "softcap": 3.0}
    compare(route(5, score=score, **renormalize, **selection, **options), tensors, device, tuple(tensors))


@every_score
@every_dtype
@pytest.mark.parametrize("renormalize", [False, True])
def test_dtypes(score, dtype, renormalize, device, instruction_set):
    call = route(3, score=score, renormalize=renormalize, stats=True)
    out = compare(call, {"logits": randn(70, 17, dtype=dtype).abs()}, device, ("logits",))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out["weights"].dtype == out["mean_prob"].dtype == out["logsumexp"].dtype == wide
    assert out["experts"].dtype == out["counts"].dtype == torch.int32
    assert out["grad logits"].dtype == dtype


SIZES = [(1, 1), (2, 2), (3, 1), (7, 7), (8, 3), (15, 4), (16, 8), (17, 16), (33, 6), (64, 6), (100, 9), (128, 8)]
SIZES += [(255, 10), (256, 8), (257, 257), (1000, 12)]


@pytest.mark.parametrize("experts, top_k", SIZES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_sizes(experts, top_k, score, device, instruction_set):
    options = {"score": score, "renormalize": score == "sigmoid", "stats": True}
    logits = randn(60, experts, scale=2.0)
    together = compare(route(top_k, **options), {"logits": logits}, device, ("logits",))
    alone = moe_ops.route(place(logits[:1], device), top_k, **options)
    assert_bitwise_equal(alone.weights, together["weights"][:1])
    compare(route(top_k, **options), {"logits": logits[:0]}, device, ("logits",))


@pytest.mark.parametrize("name", LOGITS)
@every_dtype
@every_score
def test_edges_of_logits(name, dtype, score, device, instruction_set):
    """Exact choice and order, distinct experts, NaN and infinities only where the score has them."""
    edge = torch.tensor([LOGITS[name], LOGITS["ascending"]], dtype=torch.float64)
    logits = torch.cat([edge, randn(60, 8, dtype=torch.float64)]).to(dtype)  # enough values to speak of eager's error
    for top_k in (1, 2, 5, 8):
        for options in ({}, {"softcap": 2.0}, {"renormalize": True}):
            ours = moe_ops.route(place(logits, device), top_k, score=score, **options)
            assert ours[1].tolist() == [by_hand(row, top_k) for row in logits.tolist()]
        if dtype in (torch.float32, torch.float64):
            compare(route(top_k, score=score), {"logits": logits}, device)


NANS = {  # of either sign, signalling and quiet, the smallest and the largest payload
    torch.float16: (torch.int16, (0x7C01, 0x7E00, 0x7FFF, -0x3FF, -0x200, -1)),
    torch.bfloat16: (torch.int16, (0x7F81, 0x7FC0, 0x7FFF, -0x7F, -0x40, -1)),
    torch.float32: (torch.int32, (0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -0x400000, -1)),
    torch.float64: (torch.int64, (0x7FF << 52 | 1, 0x7FF8 << 48, 2**63 - 1, -(2**52) + 1, -(2**51), -1)),
}


@every_dtype
@pytest.mark.parametrize("options", [{}, {"groups": (2, 2)}], ids=["logits", "groups"])
def test_all_nans_are_equal(dtype, options, device, instruction_set):
    """And come before every number, by their ids."""
    integer, bits = NANS[dtype]
    nans = torch.tensor(bits, dtype=integer).view(dtype)
    assert nans.isnan().all()
    row = torch.cat([nans, torch.tensor([math.inf, 0.0, -0.0, -math.inf], dtype=dtype)])
    logits = torch.stack([row[torch.randperm(10, generator=seeded(t))] for t in range(40)])
    chosen = moe_ops.route(place(logits, device), 10, score="identity", **options)[1]
    assert chosen.tolist() == [by_hand(row, 10) for row in logits.tolist()]


@every_dtype
def test_many_ties(dtype, device, instruction_set):
    for experts in (5, 16, 40, 130, 512):
        logits = integers(50, experts, dtype=dtype)
        for top_k in {1, 3, experts // 2 + 1, experts}:
            _, chosen = moe_ops.route(place(logits, device), top_k)
            assert chosen.tolist() == [by_hand(row, top_k) for row in logits.tolist()]


@pytest.mark.parametrize("experts", [3, 33, 64, 65, 130, 257, 600, 1024, 1031])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_of_wide_rows(experts, dtype, device, instruction_set):
    """NaN, infinities, signed zeros and ties on both sides of every width that kernels are made for."""
    values = torch.tensor([0.0, -0.0, 0.25, 1.0, -1.0, -2.5, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 3e38])
    logits = values[torch.randint(0, len(values), (6, experts), generator=seeded(experts))].to(dtype)
    logits[4], logits[5] = -INF, NAN
    for top_k in {1, min(9, experts), experts // 2 + 1, experts}:
        _, chosen = moe_ops.route(place(logits, device), top_k)
        assert chosen.tolist() == [by_hand(row, top_k) for row in logits.tolist()]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("experts", [20, 128, 300])
def test_keys_that_differ_in_their_last_bits(experts, biased, device, instruction_set):
    """No bit of a choice is lost where an index takes its place, and no token suffers from one that needs them all."""
    logits = 1 + torch.randint(0, 90, (37, experts), generator=seeded(experts)) * 2.0**-23
    logits[3::5] = randn(len(logits[3::5]), experts)
    logits[4, ::3] = NAN
    logits[5], logits[6], logits[17] = 0.1, -INF, NAN
    logits[18] *= -1
    bias = place(torch.zeros(experts), device) if biased else None
    ranked = [by_hand(row, 17) for row in logits.tolist()]
    for top_k in (1, 2, 7, 8, 9, 15, 16, 17):
        _, chosen = moe_ops.route(place(logits, device), top_k, score="identity", selection_bias=bias)
        assert chosen.tolist() == [row[:top_k] for row in ranked]


@pytest.mark.parametrize("groups", [(64, 5), (65, 3), (130, 70), (650, 3), (650, 650)])
def test_many_groups(groups, device, instruction_set):
    logits = integers(37, 10 * groups[0] if groups[0] < 130 else 1300)
    logits[3, ::7] = NAN
    for group_score in ("max", "top2_sum"):
        options = {"score": "identity", "groups": groups, "group_score": group_score}
        _, chosen = moe_ops.route(place(logits, device), 3, **options)
        assert torch.equal(chosen.cpu(), reference.route(logits, 3, **options)[1])


MANY = [(1024, 33, 4), (1025, 8, 5), (1500, 1500, 5), (16384, 64, 4), (20001, 3, 3)]
MANY_OPTIONS = {
    "stats": {"renormalize": True, "stats": True},
    "groups": {"score": "sigmoid", "renormalize": "pnorm", "p": 3.0},
    "capped": {"score": "sqrtsoftplus", "softcap": 2.0, "stats": True, "scale": 2.5},
}


@pytest.mark.parametrize("options", MANY_OPTIONS.values(), ids=MANY_OPTIONS.keys())
@pytest.mark.parametrize("experts, top_k, runs", MANY)
def test_many_experts(experts, top_k, runs, options, device, instruction_set):
    if "stats" not in options:
        options = options | {"groups": (runs, runs if top_k == experts else runs - 1)}
    # Few tokens, so distinct scores: near-ties may differ between devices.
    order = torch.rand(3, experts, generator=seeded()).argsort(1)
    tensors = {
        "logits": (order - experts / 2) * (6 / experts),
        "expert_scale": torch.rand(experts, generator=seeded(1)) + 0.5,
    }
    if options.get("stats"):
        options = options | {"segments": place(torch.tensor([1, 0, 1]), device), "num_segments": 2}
    compare(route(top_k, **options), tensors, device, tuple(tensors))


def test_a_bias_that_is_not_finite(device, instruction_set):
    """A bias of -inf bars an expert, +inf forces it, NaN ranks first; the weights never see it."""
    bias = torch.tensor([0.0, -INF, INF, 0.0, NAN, 0.0, 0.0, 0.0])
    logits = integers(20, 8, limit=3)
    out = compare(route(7, score="sigmoid"), {"logits": logits, "selection_bias": bias}, device, ("logits",))
    assert (out["experts"][:, :2] == torch.tensor([4, 2])).all() and not (out["experts"] == 1).any()


@pytest.mark.parametrize("barred", [False, True])
@pytest.mark.parametrize("experts", [3, 5, 8, 12, 16, 24, 40])
@every_score
def test_choices_below_zero(score, experts, barred, device, instruction_set):
    """No number of experts that leaves a vector unfilled brings in ids that are not there."""
    bias = torch.full((experts,), -3.0)
    if barred:
        bias[1:] = -INF  # equal choices: the lowest ids
    tensors = {"logits": randn(20, experts), "selection_bias": bias, "expert_scale": randn(experts, seed=1)}
    for top_k in {1, 2, experts - 1}:
        out = compare(route(top_k, score=score, stats=True), tensors, device, ("logits", "expert_scale"))
        assert out["experts"].min() >= 0 and out["experts"].max() < experts
        assert not barred or (out["experts"] == torch.arange(top_k)).all()


@pytest.mark.parametrize("mask, expected", [("-inf", [3, 2]), ("zero", [3, 0])])
def test_what_a_masked_expert_is_worth(mask, expected, device, instruction_set):
    """'zero' puts the experts outside the kept groups at 0, which beats a negative choice; '-inf' does not."""
    logits = place(torch.tensor([[-5.0, -6.0, -1.0, 7.0]]), device)
    weights, chosen = moe_ops.route(logits, 2, score="identity", groups=(2, 1), group_mask=mask)
    assert chosen.tolist() == [expected]
    assert weights.tolist() == [[logits[0, e].item() for e in expected]], "weights are unmasked"


@pytest.mark.parametrize("wanted", ["weights", "mean_prob", "logsumexp"])
@every_score
def test_each_gradient_alone(wanted, score, device, instruction_set):
    call = route(4, score=score, stats=True)
    compare(lambda api, logits: {wanted: call(api, logits)[wanted]}, {"logits": randn(40, 12)}, device, ("logits",))


@pytest.mark.parametrize("needs", [("logits",), ("expert_scale",), ("logits", "expert_scale")])
def test_each_subset_of_gradients(needs, device):
    tensors = {"logits": randn(40, 12), "expert_scale": torch.rand(12, generator=seeded())}
    compare(route(4), tensors, device, needs)


@every_layout
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(layout, dtype, device):
    tensors = {"logits": randn(30, 12, dtype=dtype), "selection_bias": randn(12), "expert_scale": randn(12).abs()}
    segments = torch.randint(0, 3, (30,), generator=seeded())
    options = {"stats": True, "num_segments": 3}
    needs = ("logits", "expert_scale")
    plain = compare(route(4, segments=place(segments, device), **options), tensors, device, needs)
    moved = {name: layout(t.unsqueeze(0)).squeeze(0) if t.dim() == 1 else layout(t) for name, t in tensors.items()}
    call = route(4, segments=place(segments, device).repeat_interleave(2)[::2], **options)
    ours = compare(call, moved, device, needs, grad_layout=lambda grad: layout(grad) if grad.dim() == 2 else grad)
    for name in plain:
        assert_bitwise_equal(ours[name], plain[name], name)


@pytest.mark.parametrize("expand", [same_rows, constant])
def test_expanded_logits_and_gradients(expand, device):
    logits = expand(randn(20, 9))
    gradients = {"weights": expand(randn(20, 3, seed=1)), "mean_prob": expand(randn(1, 9, seed=2))}
    gradients["logsumexp"] = constant(randn(20, seed=3))
    call = route(3, score="sigmoid", renormalize=True, stats=True)
    compare(call, {"logits": logits}, device, ("logits",), gradients=gradients, grad_layout=expand)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_of_any_experts(score, device, instruction_set):
    """Experts that route never returns: out of range, which count nowhere, repeated, and more than there are."""
    ids = torch.tensor([[0, 0, -1, 7, 5, 2, 2, 3, 1, 99], [6, -(2**31), 2**31 - 1, 4, 4, 4, 4, 4, 0, 5]] * 10)
    logits, scales, gradient = randn(20, 6), randn(6, seed=1), randn(20, 10, seed=2)
    inside = (ids >= 0) & (ids < 6)
    slots = ids.where(inside, 0)

    def transcription(dtype):
        z, scale = logits.to(dtype).requires_grad_(), scales.to(dtype).requires_grad_()
        s = (z.softmax(1) if score == "softmax" else z.sigmoid()).gather(1, slots) * inside
        w = s / (s.sum(1, keepdim=True) + 0.1) * 1.5 * scale[slots]
        return torch.autograd.grad(w, (z, scale), gradient.to(dtype))

    number = {"softmax": 0, "sigmoid": 2}[score]
    grad, z, experts, scale = (place(t, device) for t in (gradient, logits, ids.int(), scales))
    ours = torch.ops.moe_ops.route_backward(grad, None, None, z, experts, number, scale, 1, 0.1, 1.0, 1.5, 0.0, None, 1)
    for name, x, eager, oracle in zip(
        ("logits", "scale"), ours, transcription(torch.float32), transcription(torch.float64), strict=True
    ):
        assert_as_accurate(x, eager, oracle, name)


def test_nan_stays_in_its_token(device, instruction_set):
    logits = randn(20, 9)
    clean = compare(route(3), {"logits": logits}, device, ("logits",))
    logits[4, 2] = NAN
    ours = compare(route(3), {"logits": logits}, device)["weights"]
    others = [t for t in range(20) if t != 4]
    assert ours[4].isnan().all()
    assert_bitwise_equal(ours[others], clean["weights"][others])
    leaf = place(logits, device).requires_grad_()
    moe_ops.route(leaf, 3)[0][others].square().sum().backward()
    assert leaf.grad[others].isfinite().all()


@pytest.mark.parametrize("experts", [8, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_threads(experts, dtype, device, threads, instruction_set):
    """Float64 shows in which order the partial sums of the statistics, themselves float64, were added."""
    scale = torch.rand(experts, generator=seeded(1), dtype=dtype) + 0.5
    tensors = {"logits": randn(2001, experts, dtype=dtype), "expert_scale": scale}
    segments = place(torch.randint(-1, 7, (2001,), generator=seeded(2)), device)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        call = route(4, score="sigmoid", renormalize=True, stats=True, segments=segments, num_segments=7)
        results.append(compare(call, tensors, device, ("logits",)))
    for other in results[1:]:
        for name in other:
            assert_bitwise_equal(other[name], results[0][name], name)


def test_a_token_does_not_depend_on_the_others(device, instruction_set):
    logits = place(randn(100, 37), device)
    options = {"score": "softmax", "groups": (37, 9), "renormalize": True}
    weights, experts = moe_ops.route(logits, 5, **options)
    for token in (0, 1, 50, 99):
        alone = moe_ops.route(logits[token : token + 1], 5, **options)
        assert_bitwise_equal(alone[0][0], weights[token])
        assert_bitwise_equal(alone[1][0], experts[token])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments(dtype, device):
    """A segment without tokens has zeros; tokens of no segment count nowhere, however far off their number is."""
    logits = randn(6, 5)
    far = 2**31 - 1 if dtype == torch.int32 else 2**32
    segments = torch.tensor([0, 2, -1, far, 2, 3], dtype=dtype)
    out = compare(route(2, stats=True, segments=place(segments, device), num_segments=3), {"logits": logits}, device)
    assert out["counts"].sum(1).tolist() == [2, 0, 4] and out["mean_prob"][1].count_nonzero() == 0
    _, chosen = moe_ops.route(place(logits, device), 2)
    expected = torch.bincount(chosen.cpu()[[1, 4]].flatten(), minlength=5)
    assert out["counts"][2].tolist() == expected.tolist()


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_property_of_the_order(data):
    """Any logits at all; with groups the scores are sums of quarters, so that they are exact."""
    runs, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    experts = runs * size
    value = st.sampled_from([0.0, -0.0, 0.25, 1.0, -1.0, -2.5, INF, -INF, NAN, -NAN]) | st.floats(width=32)
    if groups := runs > 1 and data.draw(st.booleans()):
        value = st.integers(-9, 9).map(lambda n: n / 4)
    rows = data.draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=0, max_size=5))
    logits = torch.tensor(rows, dtype=data.draw(st.sampled_from(DTYPES))).view(-1, experts)
    if not groups:
        top_k = data.draw(st.integers(1, experts))
        _, chosen = moe_ops.route(logits, top_k, score=data.draw(st.sampled_from(SCORES)))
        assert chosen.tolist() == [by_hand(row, top_k) for row in logits.tolist()]
        return
    kept, group_score = data.draw(st.integers(1, runs)), data.draw(st.sampled_from(["max", "top2_sum"]))
    group_mask = data.draw(st.sampled_from(["-inf", "zero"]))
    top_k = data.draw(st.integers(1, kept * size))
    options = {"groups": (runs, kept), "group_score": group_score, "group_mask": group_mask}
    _, chosen = moe_ops.route(logits, top_k, score="identity", **options)
    expected = []
    for row in logits.tolist():
        best = [sorted(row[g * size : g * size + size])[::-1][: 1 if group_score == "max" else 2] for g in range(runs)]
        keep = by_hand([sum(b) for b in best], kept)
        outside = -INF if group_mask == "-inf" else 0.0
        expected.append(by_hand([v if e // size in keep else outside for e, v in enumerate(row)], top_k))
    assert chosen.tolist() == expected
