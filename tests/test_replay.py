"""RouterReplay to the bit, forward and backward, and what else watches a router while it plays."""

import pytest
import torch

from accuracy import assert_bitwise_equal
from cases import randn
from moe_ops import RouterHealth, RouterReplay, nn
from monitored import EXPERTS, HIDDEN, TOKENS, TOP_K, layers


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("router", [{"renormalize": True}, {"score": "sigmoid", "correction_bias": True, "scale": 2.5}])
def test_played_back_under_the_same_parameters_is_exact(router, device):
    model, x = layers(device, **router), randn(TOKENS, HIDDEN, seed=7).to(device)
    replay = RouterReplay(model)
    with replay.record():
        expected = model(x)
    expected_grads = gradients(model, expected)
    with replay.play():
        played = model(x)
    grads = gradients(model, played)
    assert_bitwise_equal(played, expected)
    for name, grad in grads.items():
        assert_bitwise_equal(grad, expected_grads[name])
    assert not model[0].router._forward_hooks and "logits" not in vars(model[0].router)


@pytest.mark.parametrize("score", ["softmax", "softmax_selected", "sigmoid"])
def test_the_choice_is_replayed_when_the_logits_moved(score, device):
    """Against the formula in float64: weights of the recorded experts under the new parameters, with their gradient."""
    model, x = layers(device, score=score, renormalize=score == "sigmoid"), randn(TOKENS, HIDDEN, seed=8).to(device)
    replay = RouterReplay(model)
    with replay.record():
        model(x)
    router = model[0].router
    experts = replay.routing["0.router"][0][1]
    with torch.no_grad():
        router.weight.add_(0.3 * randn(EXPERTS, HIDDEN, seed=9).to(device))
    natural = router(x)[1]
    assert 0 < int((natural != experts).any(1).sum()) < TOKENS
    with RouterReplay(model[0]).record() as _, replay.play():
        y, route = model[0](x, return_route=True)
        model[1](y)
    assert torch.equal(route.experts, experts)
    assert route.counts.flatten().tolist() == [int((experts == e).sum()) for e in range(EXPERTS)]
    weight = router.weight.detach().cpu().double().requires_grad_()
    logits = x.cpu().double() @ weight.T
    picked = logits.gather(1, experts.cpu().long())
    expected = {
        "softmax": lambda: logits.softmax(1).gather(1, experts.cpu().long()),
        "softmax_selected": lambda: picked.softmax(1),
        "sigmoid": lambda: picked.sigmoid() / picked.sigmoid().sum(1, keepdim=True),
    }[score]()
    torch.testing.assert_close(route.weights.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    cotangent = randn(TOKENS, TOP_K, seed=10)
    (grad,) = torch.autograd.grad((route.weights * cotangent.to(device)).sum(), router.weight)
    (expected_grad,) = torch.autograd.grad((expected * cotangent.double()).sum(), weight)
    torch.testing.assert_close(grad.cpu().double(), expected_grad, rtol=1e-4, atol=1e-5)


def test_recorded_weights_hold_jitter(device):
    model, x = layers(device, jitter=0.5), randn(TOKENS, HIDDEN, seed=11).to(device)
    replay = RouterReplay(model)
    with replay.record():
        expected = model(x)
    assert not torch.equal(model(x), expected)
    with replay.play(weights="recorded"):
        assert_bitwise_equal(model(x), expected)


def test_every_kind_of_router_is_watched_and_replayed(device):
    """Noisy top-k, whose statistics are their own type, and a cascade's routers, which stand in no MoE."""
    noisy = nn.NoisyTopKRouter(HIDDEN, EXPERTS, TOP_K)
    layer, x = nn.MoE(HIDDEN, 8, EXPERTS, TOP_K, router=noisy).to(device), randn(TOKENS, HIDDEN, seed=13).to(device)
    replay, health = RouterReplay(layer), RouterHealth(layer)
    with replay.record():
        expected, route = layer(x, return_route=True)
    assert health.summary()["router"].logsumexp_rms == pytest.approx(route.logsumexp.square().mean().sqrt().item())
    with replay.play(weights="recorded"):
        played, replayed = layer(x, return_route=True)
    assert_bitwise_equal(played, expected)
    assert_bitwise_equal(replayed.counts, route.counts)
    cascade = nn.Cascade(nn.Experts(4, HIDDEN, 8), [nn.Router(HIDDEN, 4, 2), nn.HashRouter(HIDDEN, 4, 1, 9)]).to(device)
    health = RouterHealth(cascade)
    cascade(x, token_ids=(torch.arange(TOKENS) % 9).to(device))
    assert {name: summary.tokens for name, summary in health.summary().items()} == {"routers.0": 40, "routers.1": 40}


KINDS = {
    "switch": (lambda: nn.SwitchRouter(HIDDEN, EXPERTS), lambda z, ids: z[0].softmax(1).gather(1, ids)),
    "noisy": (lambda: nn.NoisyTopKRouter(HIDDEN, EXPERTS, TOP_K), lambda z, ids: z[0].gather(1, ids).softmax(1)),
    "expert choice": (
        lambda: nn.ExpertChoiceRouter(HIDDEN, EXPERTS, TOP_K),
        lambda z, ids: z[0].softmax(1).masked_fill(ids < 0, 0),
    ),
    "hash": (
        lambda: nn.HashRouter(HIDDEN, EXPERTS, TOP_K, 9, score="sigmoid", scale=1.5),
        lambda z, ids: 1.5 * z[0].sigmoid().gather(1, ids) / z[0].sigmoid().gather(1, ids).sum(1, keepdim=True),
    ),
    "uniform hash": (lambda: nn.HashRouter(HIDDEN, EXPERTS, TOP_K, 9), lambda z, ids: torch.full(ids.shape, 0.5)),
    "hierarchical": (
        lambda: nn.HierarchicalRouter(HIDDEN, EXPERTS, TOP_K, (3, 2)),
        lambda z, ids: (
            z[1].softmax(1).gather(1, ids // 2) * z[0].unflatten(1, (3, 2)).softmax(2).flatten(1).gather(1, ids)
        ),
    ),
    "hierarchical, of the chosen": (
        lambda: nn.HierarchicalRouter(HIDDEN, EXPERTS, TOP_K, (3, 1), score="softmax_selected"),
        lambda z, ids: z[0].gather(1, ids).softmax(1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_that_can_weighs_what_was_recorded(kind, device):
    """Exact under the same parameters; under others, the paper's formula in float64 for the recorded experts."""
    build, formula = KINDS[kind]
    torch.manual_seed(0)
    router = build().to(device).eval()
    ids = (torch.arange(TOKENS) % 9).to(device)
    x, replay = randn(TOKENS, HIDDEN, seed=18).to(device), RouterReplay(router)
    with replay.record():
        weights, experts = router(x, token_ids=ids)
    with replay.play():
        again = router(x, token_ids=ids)
    assert_bitwise_equal(again[0], weights)
    assert_bitwise_equal(again[1], experts)
    parameters = [p for p in (router.weight, getattr(router, "group_weight", None)) if p is not None]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.5 * randn(*parameter.shape, seed=19).to(device))
    if "hash" not in kind:
        assert not torch.equal(router(x, token_ids=ids)[1], experts)
    with replay.play():
        weights, played = router(x, token_ids=ids, stats=True)[:2]
    assert_bitwise_equal(played, experts)
    exact = [parameter.detach().cpu().double().requires_grad_() for parameter in parameters]
    expected = formula([x.cpu().double() @ weight.T for weight in exact], experts.cpu().long()).double()
    torch.testing.assert_close(weights.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    if parameters:
        cotangent = randn(*weights.shape, seed=20)
        grads = torch.autograd.grad((weights * cotangent.to(device)).sum(), parameters, materialize_grads=True)
        wanted = torch.autograd.grad((expected * cotangent.double()).sum(), exact, materialize_grads=True)
        for grad, exact_grad in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["recomputed", "recorded"])
def test_a_rollout_in_inference_mode_is_replayed_in_training(weights, device):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=16).to(device)
    replay = RouterReplay(model)
    with torch.inference_mode(), replay.record():
        expected = model(x)
    with replay.play(weights=weights):
        played = model(x)
    played.sum().backward()
    assert_bitwise_equal(played.detach(), expected)
    assert model[0].experts.w_in.grad.any()


def test_what_is_played_is_what_is_counted(device):
    model, x = layers(device, jitter=0.5, correction_bias=True), randn(TOKENS, HIDDEN, seed=17).to(device)
    health, balancing, replay = RouterHealth(model), nn.LossFreeBalancing(model), RouterReplay(model)
    with replay.record():
        model(x)
    recorded, counts = health.summary()["0"].load, balancing.counts[0]
    health.reset()
    with replay.play():
        model(x)
    assert health.summary()["0"].load == recorded
    assert torch.equal(balancing.counts[0], 2 * counts)


def test_a_play_that_is_refused_leaves_no_hook(device):
    sampled = nn.SparseMixerRouter(HIDDEN, EXPERTS, TOP_K)
    model = torch.nn.ModuleList([layers(device), nn.MoE(HIDDEN, 8, EXPERTS, TOP_K, router=sampled)])
    refused = pytest.raises(TypeError, match=r"must be 'recorded' for 1.router, a SparseMixerRouter, got 'recomputed'")
    with refused, RouterReplay(model).play():
        pass
    for layer in model[0]:
        assert not layer.router._forward_hooks and "logits" not in vars(layer.router)


def test_what_was_not_recorded_is_refused(device):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=12).to(device)
    replay = RouterReplay(model)
    with replay.record():
        model(x)
    with pytest.raises(ValueError, match=r"0.router must route .* \[40, 2\] as recorded, got \[39, 2\]"), replay.play():
        model(x[1:])
    with pytest.raises(RuntimeError, match=r"0.router was recorded 1 times, but called 0 times"), replay.play():
        pass
    with pytest.raises(RuntimeError, match=r"0.router was recorded 1 times, and is called again"), replay.play():
        model(x)
        model(x)
    with pytest.raises(ValueError, match=r"must have a moe_ops.nn router, got none"):
        RouterReplay(torch.nn.Linear(2, 2))
    assert torch.equal(model(x), model(x))


def test_play_within_play():
    router = nn.Router(HIDDEN, EXPERTS, TOP_K)
    replay, x = RouterReplay(router), randn(TOKENS, HIDDEN, seed=1)
    with replay.record():
        router(x)
    twice = RouterReplay(router)
    with replay.play():
        with pytest.raises(RuntimeError, match=r"^RouterReplay.play: router is played already"), twice.play():
            pass
        router(x)
    with replay.play():
        router(x)
