"""The routers of nn beyond Router, each against its paper's formulas in plain torch: values, choices, gradients."""

import math

import pytest
import torch
from torch.nn import functional as F

from accuracy import assert_close
from cases import WIDEST
from layers import ATOL, EXPERTS, HIDDEN, INNER, RTOL, TOP_K, assert_same_gradients, build, dense_moe, tokens
from moe_ops import nn

# ---- Switch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_switch_drops_over_capacity(policy, device):
    router = build(nn.SwitchRouter, EXPERTS)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, 1, router=router, capacity_factor=0.75, drop_policy=policy, dtype=WIDEST).to(
        device
    )
    layer.eval()  # no jitter
    x = tokens(40).to(device).requires_grad_()
    probability, chosen = (x @ router.weight.T).softmax(-1).max(-1)
    capacity = math.ceil(0.75 * 40 / EXPERTS)
    gates = torch.zeros(40, EXPERTS, dtype=WIDEST, device=device)
    order = range(40) if policy == "position" else probability.argsort(descending=True).tolist()
    taken = [0] * EXPERTS
    kept = torch.zeros(40, dtype=torch.bool)
    for t in order:
        expert = int(chosen[t])
        taken[expert] += 1
        kept[t] = taken[expert] <= capacity
    assert 0 < kept.sum() < 40
    gates = F.one_hot(chosen, EXPERTS) * (probability * kept.to(device)).unsqueeze(1)
    y, expected = layer(x), dense_moe(layer, x, gates)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert not y[~kept].any()
    assert_same_gradients(y, expected, [x, *layer.parameters()])


def test_switch_is_transformers_router():
    switch = pytest.importorskip("transformers.models.switch_transformers.modeling_switch_transformers")
    config = switch.SwitchTransformersConfig(hidden_size=HIDDEN, num_experts=EXPERTS, expert_capacity=6)
    theirs = switch.SwitchTransformersTop1Router(config).eval()
    router = nn.SwitchRouter(HIDDEN, EXPERTS).eval()
    x = tokens(1, 30, dtype=torch.float32)
    with torch.no_grad():
        router.weight.copy_(theirs.classifier.weight)
        mask, probability, _ = theirs(x)
        weights, experts = router(x)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, 1, router=router, capacity_factor=1.0)
    assert layer.capacity(30) == 6
    torch.testing.assert_close(weights, probability[0])
    kept = mask[0].sum(-1).bool()
    assert 0 < kept.sum() < 30
    assert torch.equal(experts[kept, 0].long(), mask[0].argmax(-1)[kept])
    assert torch.equal(layer(x)[0].abs().sum(-1) > 0, kept)


def test_switch_jitters_in_training_and_starts_small():
    torch.manual_seed(0)
    router = nn.SwitchRouter(1000, 16, jitter=0.2)
    assert abs(router.weight.std().item() / (0.1 / 1000) ** 0.5 / 0.8796 - 1) < 0.05  # 0.8796: cut at two deviations
    assert router.weight.abs().max() <= 2 * (0.1 / 1000) ** 0.5
    x = torch.ones(3, 1000)
    assert not torch.equal(router.logits(x), router.logits(x))
    assert torch.equal(router.eval().logits(x), router.logits(x))


# ---- noisy top-k ----------------------------------------------------------------------------------------------------


def noisy_reference(router, x, top_k):
    """Gates, load and their graph by Shazeer et al.'s equations 3 to 5 and 8 to 10, one token and expert at a time."""
    clean = x @ router.weight.T
    deviation = F.softplus(x @ router.noise_weight.T)
    noisy = clean + torch.randn_like(clean) * deviation
    gates, load = torch.zeros_like(noisy), []
    for t in range(len(x)):
        best = noisy[t].topk(top_k)
        gates = gates.index_put((torch.tensor(t), best.indices), best.values.softmax(0))
        row = []
        for e in range(noisy.shape[1]):
            others = torch.cat([noisy[t, :e], noisy[t, e + 1 :]])
            z = (clean[t, e] - others.sort(descending=True).values[top_k - 1]) / deviation[t, e]
            row.append(0.5 * (1 + torch.erf(z / math.sqrt(2))))
        load.append(torch.stack(row))
    return gates, torch.stack(load).sum(0)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_noisy_top_k_matches_equations(top_k, device):
    router = build(nn.NoisyTopKRouter, EXPERTS, top_k)
    with torch.no_grad():
        router.noise_weight.normal_()
    router.to(device)
    x = tokens(9).to(device).requires_grad_()
    torch.manual_seed(3)
    result = router(x, stats=True)
    torch.manual_seed(3)
    gates, load = noisy_reference(router, x, top_k)
    ours = torch.zeros_like(gates).scatter(1, result.experts.long(), result.weights)
    assert_close(ours, gates, rtol=RTOL, atol=ATOL)
    assert_close(result.load, load, rtol=RTOL, atol=ATOL)
    wanted = [x, router.weight, router.noise_weight]
    assert_same_gradients(result.load, load, wanted)
    if top_k > 1:  # the softmax over one is constant
        assert_same_gradients(ours, gates, wanted)
    assert abs(result.load.sum().item() - 9 * top_k) < 9 * top_k  # the chance of each, not of all


def test_noisy_top_k_without_noise(device):
    router = build(nn.NoisyTopKRouter, EXPERTS, TOP_K).to(device).eval()
    x = tokens(20).to(device)
    result = router(x, stats=True)
    values, chosen = (x @ router.weight.T).topk(TOP_K)
    assert torch.equal(result.experts.long(), chosen)
    assert_close(result.weights, values.softmax(-1), rtol=RTOL, atol=ATOL)
    assert result.load.tolist() == result.counts[0].tolist()
    everyone = build(nn.NoisyTopKRouter, EXPERTS, EXPERTS).to(device)
    assert everyone(x, stats=True).load.tolist() == [20] * EXPERTS


def test_even_start_lets_noise_choose():
    router = nn.init.even_(build(nn.NoisyTopKRouter, EXPERTS, 1))
    counts = router(tokens(500), stats=True).counts
    assert counts.min() > 60
    assert not router.weight.any()


# ---- expert choice --------------------------------------------------------------------------------------------------


def expert_choice_gates(router, x):
    """[tokens, experts]: every expert's largest entries of its column of S."""
    score = (x @ router.weight.T).softmax(-1)
    capacity = math.ceil(len(x) * router.top_k / router.num_experts)
    chosen = score.T.topk(capacity, dim=1).indices  # [experts, capacity]
    return score * torch.zeros_like(score).scatter(0, chosen.T, 1)


@pytest.mark.parametrize("impl", ["moe_ops", "naive"])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_expert_choice_matches_paper(count, impl, device):
    router = build(nn.ExpertChoiceRouter, EXPERTS, TOP_K)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, router=router, impl=impl, dtype=WIDEST).to(device)
    x = tokens(count).to(device).requires_grad_()
    gates = expert_choice_gates(router, x)
    y, result = layer(x, return_route=True)
    expected = dense_moe(layer, x, gates)
    assert_close(result.weights, gates, rtol=RTOL, atol=ATOL)
    assert torch.equal(result.experts >= 0, gates > 0)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert_same_gradients(y, expected, [x, *layer.parameters()])
    assert result.counts.tolist() == [[router.capacity(count)] * EXPERTS]
    plan = router.plan(result.experts)
    assert plan.row_slot.shape == (EXPERTS * router.capacity(count),)  # no rows for what was not taken


def test_expert_choice_is_not_causal(device):
    router = build(nn.ExpertChoiceRouter, EXPERTS, 1).to(device)
    assert not router.causal and nn.Router.causal
    x = tokens(20).to(device)
    before = router(x)[1]
    x[-1] = 100 * router.weight[before[0].argmax()].detach()  # the last token takes the place of an earlier one
    changed = (router(x)[1] != before).any(1)
    assert changed[:-1].any()


def test_expert_choice_without_tokens(device):
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, router=build(nn.ExpertChoiceRouter, EXPERTS, TOP_K), dtype=WIDEST)
    x = tokens(0).to(device).requires_grad_()
    y, result = layer.to(device)(x, return_route=True)
    assert y.shape == (0, HIDDEN)
    assert not result.counts.any()
    y.sum().backward()


def test_expert_choice_counts_by_segment(device):
    router = build(nn.ExpertChoiceRouter, EXPERTS, TOP_K).to(device)
    segments = torch.tensor([0, 2, 7, -1, 2, 0, 0, 1, 2, 1], device=device)
    result = router(tokens(10).to(device), stats=True, segments=segments, num_segments=3)
    taken = result.experts >= 0
    expected = torch.stack([taken[segments == s].sum(0) for s in range(3)]).int()
    assert torch.equal(result.counts, expected)
