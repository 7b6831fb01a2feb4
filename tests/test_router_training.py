"""Losses, balancing and stability of routers; zero-computation experts and cascades, against loops in plain torch."""

import copy
import math

import pytest
import torch
import torch.distributed as dist

import ranks
from accuracy import assert_close
from cases import WIDEST
from layers import ATOL, EXPERTS, HIDDEN, INNER, RTOL, TOP_K, assert_same_gradients, build, feed_forward, tokens
from moe_ops import losses, nn, route

# ---- losses ---------------------------------------------------------------------------------------------------------


def squared_variation(values):
    return values.var(unbiased=False) / values.mean() ** 2


def test_importance_and_load(device):
    router = build(nn.NoisyTopKRouter, EXPERTS, TOP_K).to(device)
    x = tokens(20).to(device).requires_grad_()
    result = router(x, stats=True)
    sums = torch.stack([(result.weights * (result.experts == e)).sum() for e in range(EXPERTS)])
    wanted = [x, router.weight, router.noise_weight]
    for ours, expected in (
        (losses.importance(result.weights, result.experts, EXPERTS, weight=0.1), 0.1 * squared_variation(sums)),
        (losses.load(result.load, weight=0.1), 0.1 * squared_variation(result.load)),
    ):
        assert_close(ours, expected, rtol=RTOL, atol=ATOL)
        assert_same_gradients(ours, expected, wanted)
    assert losses.load_balancing(result).item() > 0
    outside = torch.tensor([[0, -1], [1, 7]])
    weights = torch.tensor([[2.0, 9.0], [1.0, 9.0]])
    assert losses.importance(weights, outside, 2).item() == pytest.approx(0.25 / 2.25)
    assert losses.importance(weights[:0], outside[:0], 2).item() == losses.load(torch.zeros(3)).item() == 0


def test_entropies(device):
    logits = (3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=WIDEST)).to(device)
    logits.requires_grad_()
    p = logits.softmax(1)
    local = -0.5 * (p * p.log()).sum(1).mean()
    mean = p.mean(0)
    spread = 0.5 * (mean * mean.log()).sum()
    for ours, expected in (
        (losses.local_entropy(logits, weight=0.5), local),
        (losses.global_entropy(mean.unsqueeze(0), weight=0.5), spread),
    ):
        assert_close(ours, expected, rtol=RTOL, atol=ATOL)
        assert_same_gradients(ours, expected, [logits])
    even = torch.tensor([[0.25] * 4, [0.0] * 4])
    assert losses.global_entropy(even).item() == pytest.approx(-math.log(4))
    assert losses.local_entropy(torch.empty(0, 4)).item() == 0


def test_entropies_of_probabilities_that_came_to_zero(device):
    """float32 against float64, whose probabilities are none of them 0."""
    spread = [[0.0, -200.0, 1.0], [2.0, -300.0, 0.5]]
    grads = []
    for dtype in (torch.float32, WIDEST):
        logits = torch.tensor(spread, dtype=dtype, device=device, requires_grad=True)
        result = route(logits, top_k=1, stats=True)
        loss = losses.local_entropy(logits) - 3 * losses.global_entropy(result.mean_prob)
        grads.append(torch.autograd.grad(loss, logits)[0].double())
    assert grads[0].any()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)


def ranked():
    torch.manual_seed(0)
    return nn.Router(HIDDEN, EXPERTS, TOP_K, correction_bias=True)


def balance_on_two():
    router, x = ranked(), tokens(24, dtype=torch.float32)[dist.get_rank() :: 2]
    balancing = nn.LossFreeBalancing(router, rate=0.5, group=dist.group.WORLD)
    loss = losses.load_balancing(router(x, stats=True), group=dist.group.WORLD)
    loss.backward()
    balancing()
    return loss.detach(), router.weight.grad, router.selection_bias


def test_two_ranks_balance_as_one_with_all_tokens(pytestconfig):
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("the ranks are processes on a CPU")
    first, second = ranks.run(2, balance_on_two)
    router = ranked()
    balancing = nn.LossFreeBalancing(router, rate=0.5)
    loss = losses.load_balancing(router(tokens(24, dtype=torch.float32), stats=True))
    loss.backward()
    balancing()
    torch.testing.assert_close((first[0] + second[0]) / 2, loss.detach())
    torch.testing.assert_close((first[1] + second[1]) / 2, router.weight.grad)
    assert torch.equal(first[2], second[2]) and torch.equal(first[2], router.selection_bias)
    assert router.selection_bias.any()


# ---- loss-free balancing --------------------------------------------------------------------------------------------


def test_balancing_updates_once_per_optimizer_step(device):
    router = nn.Router(HIDDEN, EXPERTS, TOP_K, score="sigmoid", correction_bias=True)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, router=router).to(device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    balancing = nn.LossFreeBalancing(layer, rate=0.25)
    handle = balancing.attach(optimizer)
    batches = [tokens(30, dtype=torch.float32, seed=s).to(device) for s in (1, 2)]
    expected = sum(router(x, stats=True).counts[0] for x in batches).float()
    balancing.counts[0].zero_()
    for x in batches:  # two micro-batches
        layer(x).sum().backward()
    layer.eval()(batches[0])  # not counted
    optimizer.step()
    step = 0.25 * torch.sign(expected.mean() - expected)
    assert step.any()
    assert torch.equal(router.selection_bias, step)
    assert not balancing.counts[0].any()
    handle.remove()
    balancing.remove()
    layer.train()(batches[0])
    optimizer.step()
    assert torch.equal(router.selection_bias, step) and not balancing.counts[0].any()


def test_balancing_does_not_count_a_copy_of_the_model():
    router = nn.Router(HIDDEN, EXPERTS, TOP_K, correction_bias=True)
    balancing = nn.LossFreeBalancing(router)
    copy.deepcopy(router)(tokens(10, dtype=torch.float32))
    assert not balancing.counts[0].any()
    router(tokens(10, dtype=torch.float32))
    assert balancing.counts[0].sum() == 10 * TOP_K


def test_balancing_needs_a_bias():
    with pytest.raises(ValueError, match=r"^LossFreeBalancing: model must have a Router built with correction_bias"):
        nn.LossFreeBalancing(nn.Router(HIDDEN, EXPERTS, TOP_K))


# ---- experts that do not compute, experts in sequence ---------------------------------------------------------------


@pytest.mark.parametrize("counts", [(1, 0, 0), (0, 1, 0), (2, 1, 2)], ids=str)
def test_zero_computation_experts_match_formulas(counts, device):
    zero, skip, constant = counts
    more = build(nn.ZeroComputationExperts, zero=zero, skip=skip, constant=constant)
    layer = nn.MoE(HIDDEN, INNER, 3, 2, zero_computation=more, dtype=WIDEST, router={"renormalize": True}).to(device)
    x = tokens(40).to(device).requires_grad_()
    weights, experts = layer.router(x)
    assert set(experts.flatten().tolist()) == set(range(3 + sum(counts)))
    rows = []
    for t in range(40):
        y = torch.zeros_like(x[t])
        for w, e in zip(weights[t], experts[t].tolist(), strict=True):
            if e < 3:
                y = y + w * feed_forward(x[t], layer.experts, e)
            elif 3 + zero <= e < 3 + zero + skip:
                y = y + w * x[t]
            elif e >= 3 + zero + skip:
                a = (more.mix[e - 3 - zero - skip] @ x[t]).softmax(0)
                y = y + w * (a[0] * x[t] + a[1] * more.vectors[e - 3 - zero - skip])
        rows.append(y)
    y, expected = layer(x), torch.stack(rows)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert_same_gradients(y, expected, [x, *layer.parameters()])


def test_projections_and_zero_computation_experts_follow_the_tokens_dtype():
    """float32 weights under bfloat16 tokens, and autocast: bfloat16 out, within its rounding of float32."""
    more = nn.ZeroComputationExperts(HIDDEN, skip=1, constant=1)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, latent=8, shared_inner=4, shared_gate=True, zero_computation=more)
    x = tokens(20).bfloat16()
    expected = layer(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = layer(x.float())
    for y in (layer(x), under_autocast):
        assert y.dtype == torch.bfloat16
        assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("residual", [True, False])
def test_cascade_applies_experts_in_sequence(residual, device):
    torch.manual_seed(0)
    experts = nn.Experts(EXPERTS, HIDDEN, INNER, dtype=WIDEST)
    routers = [nn.Router(HIDDEN, EXPERTS, TOP_K, dtype=WIDEST) for _ in range(3)]
    cascade = nn.Cascade(experts, routers, residual=residual).to(device)
    x = tokens(2, 4).to(device).requires_grad_()
    expected = []
    for token in x.reshape(8, HIDDEN):
        for router in routers:
            best = (router.weight @ token).softmax(0).topk(TOP_K)
            pairs = zip(best.values, best.indices.tolist(), strict=True)
            step = sum(w * feed_forward(token, experts, e) for w, e in pairs)
            token = token + step if residual else step
        expected.append(token)
    expected = torch.stack(expected).reshape(x.shape)
    y, routes = cascade(x, return_route=True)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert_same_gradients(y, expected, [x, *cascade.parameters()])
    assert torch.equal(y, cascade(x)) and [r.counts.sum().item() for r in routes] == [8 * TOP_K] * 3


# ---- stability ------------------------------------------------------------------------------------------------------


def test_parameter_groups_give_routers_their_own_options():
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, shared_inner=4, router={"bias": True})
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), layer, layer])
    groups = nn.parameter_groups(model, {"lr": 0.5, "weight_decay": 0.0}, lr=0.25)
    assert [id(p) for p in groups[1]["params"]] == [id(layer.router.weight), id(layer.router.bias)]
    assert len(groups[0]["params"]) + 2 == len(list(model.parameters()))
    optimizer = torch.optim.SGD(groups, lr=1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]


def test_gradient_smoothing_is_the_corrected_average():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    smoothing = nn.GradientSmoothing([parameter], decay=0.75)
    smoothing.attach(optimizer)
    average, expected = torch.zeros(2), torch.zeros(2)
    for step, grad in enumerate(torch.tensor([[1.0, -2.0], [3.0, 0.0], [0.0, 8.0]]), 1):
        parameter.grad = grad.clone()
        optimizer.step()
        average = 0.75 * average + 0.25 * grad
        expected = expected - average / (1 - 0.75**step)
        torch.testing.assert_close(parameter.detach(), expected)
        again = nn.GradientSmoothing([parameter], decay=0.75)
        again.load_state_dict(smoothing.state_dict())
        assert torch.equal(again.averages[0], smoothing.averages[0]) and again.steps == [step]


def test_capacity_follows_the_routers_top_k():
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, 1, capacity_factor=1.5)
    for top_k in (1, 3, 2):
        layer.router.set_top_k(top_k)
        assert layer.capacity(11) == math.ceil(1.5 * 11 * top_k / EXPERTS)


def test_top_k_stays_within_the_groups_that_are_kept():
    router = nn.Router(HIDDEN, 8, 2, groups=(4, 2))
    router.set_top_k(4)
    with pytest.raises(ValueError, match=r"^route: groups .* top_k"):
        router.set_top_k(5)
    assert router.top_k == 4


def test_warm_up_of_top_k_and_capacity():
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    warm_up = nn.WarmUp(layer, 4, top_k=(5, 1), capacity_factor=(3.0, 1.0))
    warm_up.attach(optimizer)
    seen = []
    for _ in range(6):
        layer(tokens(10, dtype=torch.float32)).sum().backward()
        seen.append((layer.router(tokens(10, dtype=torch.float32))[1].shape[1], layer.capacity(10)))
        optimizer.step()
    rows = [math.ceil(f * 10 * k / EXPERTS) for k, f in [(5, 3.0), (4, 2.5), (3, 2.0), (2, 1.5), (1, 1.0)]]
    assert seen == [*zip([5, 4, 3, 2, 1], rows, strict=True), (1, rows[-1])]
    warm_up.load_state_dict({"step": 2})
    assert layer.router.top_k == 3
    fixed = nn.MoE(HIDDEN, INNER, 4, 2, router=nn.HierarchicalRouter(HIDDEN, 4, 2, (2, 2)))
    with pytest.raises(ValueError, match=r"^HierarchicalRouter: top_k must stay 2, got 4"):
        nn.WarmUp(fixed, 4, top_k=(4, 2))


def test_upcycled_experts_are_the_dense_layer(device):
    experts = nn.Experts(EXPERTS, HIDDEN, INNER, bias=True, dtype=WIDEST)
    w_in, w_out = torch.randn(2 * INNER, HIDDEN, dtype=WIDEST), torch.randn(HIDDEN, INNER, dtype=WIDEST)
    nn.init.upcycle_(experts, w_in, w_out)
    x = tokens(6)
    gate, up = (x @ w_in.T).chunk(2, dim=1)
    dense = (gate * gate.sigmoid() * up) @ w_out.T
    weights, chosen = nn.Router(HIDDEN, EXPERTS, TOP_K, renormalize=True, dtype=WIDEST)(x)
    y = experts.to(device)(x.to(device), weights.to(device), chosen.to(device))
    assert_close(y.cpu(), dense, rtol=RTOL, atol=ATOL)
    nn.init.upcycle_(experts, w_in.to(device), w_out.to(device), noise=0.1)
    spread = (experts.w_in - w_in.to(device)).std() / w_in.std().to(device)
    assert 0.08 < spread < 0.12


def test_losses_repeat_bit_for_bit(device):
    router = nn.NoisyTopKRouter(HIDDEN, 64, 4).to(device)
    x = tokens(4096, dtype=torch.float32).to(device)

    def run():
        torch.manual_seed(0)
        result = router(x, stats=True)
        loss = losses.importance(result.weights, result.experts, 64) + losses.load(result.load)
        loss = loss + losses.global_entropy(result.mean_prob) + losses.local_entropy(router.logits(x))
        return loss, *torch.autograd.grad(loss, list(router.parameters()))

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
