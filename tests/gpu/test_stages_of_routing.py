"""route, plan, permute and combine as nvcc compiles them, without torch: see library.py for where they run."""

import pytest
import torch
from params import STRUCTS

from accuracy import assert_bitwise_equal, hold, references
from cases import CASES, LOGITS, Case, crowded, every_case, integers, padded_rows, powers, randn, seeded
from moe_ops import reference
from moe_ops.checks import DROP_POLICIES, GROUP_MASKS, GROUP_SCORES, RENORMALIZE, SCORES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


# ---- route ----------------------------------------------------------------------------------------------------------


def route_by_reference(top_k, options):
    def call(api, logits, **tensors):
        return api.route(logits, top_k, stats=True, **options, **tensors)._asdict()

    return call


def route(
    card, gradients, top_k, logits, selection_bias=None, expert_scale=None, *, score="softmax", groups=(1, 1),
    group_score="top2_sum", group_mask="-inf", renormalize=False, segments=None, num_segments=1, **numbers,
):  # fmt: skip
    """Weights, experts, statistics and gradients."""
    (tokens, experts), floats = logits.shape, {"dtype": torch.float32}
    cells = (num_segments, experts)
    out = {
        "weights": card.new(tokens, top_k, **floats),
        "experts": card.new(tokens, top_k, dtype=torch.int32),
        "counts": card.new(*cells, dtype=torch.int32),
        "mean_prob": card.new(*cells, **floats),
        "logsumexp": card.new(tokens, **floats),
        "grad logits": card.new(tokens, experts, dtype=logits.dtype),
    }
    scale_grad = card.new(experts, **floats)
    both = {
        "logits": card.matrix(logits), "tokens": tokens, "experts": experts, "top_k": top_k,
        "options": STRUCTS["RouteOptions"](score=SCORES[score], renormalize=RENORMALIZE[renormalize], **numbers),
        "expert_scale": card.put(expert_scale), "segments": card.put(segments), "num_segments": num_segments,
    }  # fmt: skip
    forward = {name: card.address(out[name]) for name in ("weights", "counts", "mean_prob", "logsumexp")}
    card.run(
        "route", "RouteParams", **both, **forward, chosen=card.address(out["experts"]),
        selection_bias=card.put(selection_bias), num_groups=groups[0], top_groups=groups[1],
        group_score=GROUP_SCORES[group_score], group_mask=GROUP_MASKS[group_mask],
    )  # fmt: skip
    backward = {f"grad_{name}": card.put(gradients[name].float()) for name in ("weights", "mean_prob", "logsumexp")}
    card.run(
        "route_backward", "RouteBackwardParams", **both, **backward, chosen=card.address(out["experts"]),
        grad_logits=card.matrix(out["grad logits"]),
        grad_expert_scale=card.address(scale_grad) if expert_scale is not None else None,
    )  # fmt: skip
    card.fetch()
    return out if expert_scale is None else out | {"grad expert_scale": scale_grad}


def check_route(card, top_k, tensors, **options):
    gradients = {}
    needs = tuple(name for name in tensors if name != "selection_bias")
    oracle, eager = references(route_by_reference(top_k, options), tensors, needs, gradients)
    hold(route(card, gradients, top_k, **tensors, **options), eager, oracle)


RENORMALIZED = [{}, {"renormalize": True, "eps": 1e-3}, {"renormalize": "clamp", "eps": 0.6}]
RENORMALIZED += [{"renormalize": "pnorm", "p": 2.0}]
SELECTIONS = [{}, {"groups": (4, 2), "group_score": "max"}, {"groups": (6, 3), "group_mask": "zero"}]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", RENORMALIZED, ids=lambda options: str(options.get("renormalize")))
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda options: str(options.get("groups")))
def test_route(score, renormalize, selection, card):
    tensors = {"logits": randn(60, 24), "expert_scale": torch.rand(24, generator=seeded(1)) + 0.5}
    if score == "identity":
        tensors["logits"] = tensors["logits"].abs()
    if "group_mask" in selection:
        tensors["selection_bias"] = randn(24, seed=2, scale=0.1)
    segments = torch.randint(-1, 5, (60,), generator=seeded(3)).int()
    options = {"segments": segments, "num_segments": 4, "scale": 1.5, "softcap": 3.0}
    check_route(card, 5, tensors, score=score, **renormalize, **selection, **options)


@every_dtype
@pytest.mark.parametrize("tokens, experts, top_k", [(9, 1, 1), (0, 8, 2), (70, 17, 3), (65, 256, 8), (3, 1100, 9)])
def test_route_sizes(tokens, experts, top_k, dtype, card):
    check_route(card, top_k, {"logits": randn(tokens, experts, dtype=dtype, scale=2.0)}, score="softmax")


@pytest.mark.parametrize("name", LOGITS)
def test_route_edges(name, card):
    """Choice and order are exact, NaN and infinities stand where the reference has them."""
    edge = torch.tensor([LOGITS[name], LOGITS["ascending"]])
    logits, gradients = torch.cat([edge, randn(60, 8)]), {}
    oracle, eager = references(route_by_reference(5, {}), {"logits": logits}, ("logits",), gradients)
    ours = route(card, gradients, 5, logits)
    chosen = ("weights", "experts", "counts")  # eager's own errors say little of sums that overflow
    hold(*({key: results[key] for key in chosen} for results in (ours, eager, oracle)))


# ---- plan, permute, combine -----------------------------------------------------------------------------------------


def check_plan(card, ids, experts, capacity, policy):
    tokens, top_k = ids.shape
    weights = integers(tokens, top_k, seed=3)  # many ties
    expected = reference.plan(ids, experts, capacity=capacity, drop_policy=policy, weights=weights)
    shapes = ((experts + 1,), (tokens * top_k,), (tokens, top_k), (experts,))
    ours = reference.Plan(*(card.new(*shape, dtype=torch.int32) for shape in shapes))
    options = {} if capacity is None else {"capacity": capacity}
    card.run(
        "plan", "PlanParams", experts=card.put(ids), experts_are_int64=ids.dtype == torch.int64, tokens=tokens,
        top_k=top_k, num_experts=experts, weights=card.vector(weights),
        drop_policy=DROP_POLICIES[policy], **options,
        **{name: card.address(value) for name, value in ours._asdict().items()},
    )  # fmt: skip
    card.fetch()
    for name, value in ours._asdict().items():
        assert_bitwise_equal(value, getattr(expected, name), name)


LARGE = Case("several_blocks", tokens=1500, experts=60, top_k=4, choose=crowded)


@pytest.mark.parametrize("policy", DROP_POLICIES)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=lambda case: case.name)
def test_plan(case, policy, card):
    for dtype, capacity in ((torch.int32, None), (torch.int64, 2), (torch.int32, 0)):
        check_plan(card, case.ids(dtype).contiguous(), case.experts, capacity, policy)


def plan_of(case):
    return reference.plan(case.ids(), case.experts, capacity=4)


def maps(card, plan, tokens):
    """What permute and combine are told of a plan."""
    return {"slot_row": card.put(plan.slot_row), "tokens": tokens, "width": plan.slot_row.shape[1]}


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_permute(case, dtype, card):
    plan, rows = plan_of(case), integers(case.tokens, case.hidden, limit=100).to(dtype)
    for x in (rows, padded_rows(rows)):
        out = card.new(len(plan.row_slot), case.hidden, dtype=dtype)
        card.run(
            "permute", "PermuteParams", x=card.put(x), x_stride_bytes=x.stride(0) * x.element_size(),
            row_slot=card.put(plan.row_slot), **maps(card, plan, case.tokens), rows=len(out),
            row_bytes=case.hidden * x.element_size(), out=card.address(out),
        )  # fmt: skip
        card.fetch()
        assert_bitwise_equal(out, reference.permute(x, plan))


@every_case
@every_dtype
@pytest.mark.parametrize("weighted", [True, False])
def test_combine(case, dtype, weighted, card):
    """Whole numbers and powers of two: every sum is exact."""
    plan, gradients = plan_of(case), {}
    tensors = {"rows": integers(len(plan.row_slot), case.hidden, dtype=dtype)}
    if weighted:
        tensors["weights"] = powers(*plan.slot_row.shape)

    def call(api, rows, weights=None):
        return api.combine(rows, weights, plan)

    oracle, eager = references(call, tensors, tuple(tensors), gradients)
    ours = {"result": card.new(case.tokens, case.hidden, dtype=dtype)}
    ours |= {f"grad {name}": card.new(*t.shape, dtype=t.dtype) for name, t in tensors.items()}
    rows, weights = card.matrix(tensors["rows"]), card.vector(tensors.get("weights"))
    both = {"weights": weights, **maps(card, plan, case.tokens), "num_rows": len(plan.row_slot), "hidden": case.hidden}
    card.run("combine", "CombineParams", rows=rows, y=card.matrix(ours["result"]), **both)
    card.run(
        "combine_backward", "CombineBackwardParams", grad_y=card.matrix(gradients["result"].to(dtype)), rows=rows,
        row_slot=card.put(plan.row_slot), grad_rows=card.matrix(ours["grad rows"]),
        grad_weights=card.address(ours["grad weights"]) if weighted else None, **both,
    )  # fmt: skip
    card.fetch()
    hold(ours, eager, oracle, exact=True)
