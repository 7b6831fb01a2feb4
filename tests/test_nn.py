"""nn.Router, nn.Experts and nn.MoE against loops over tokens written here in plain torch, and what modules must do."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from accuracy import assert_close
from cases import WIDEST
from layers import EXPERTS, HIDDEN, INNER, TOP_K, assert_same_gradients, feed_forward, tokens
from moe_ops import nn


def loop_route(router, x):
    """Weights and experts [tokens, top_k] with renormalised softmax or sigmoid scores."""
    logits = x @ router.weight.T
    if router.bias is not None:
        logits = logits + router.bias
    scores = logits.sigmoid() if router.options["score"] == "sigmoid" else logits.softmax(-1)
    choice = scores if router.selection_bias is None else scores + router.selection_bias
    experts = choice.topk(router.top_k, dim=-1).indices
    weights = scores.gather(1, experts)
    weights = weights / weights.sum(-1, keepdim=True) * router.options["scale"]
    return weights if router.expert_scale is None else weights * router.expert_scale[experts], experts


def loop_moe(layer, x):
    """The whole layer, one (token, expert) pair at a time."""
    tokens = x.reshape(-1, x.shape[-1])
    weights, experts = loop_route(layer.router, tokens)
    inputs = tokens if layer.latent_in is None else tokens @ layer.latent_in.weight.T
    capacity = len(tokens) * layer.router.top_k
    if layer.capacity_factor is not None:
        capacity = math.ceil(layer.capacity_factor * capacity / layer.router.num_experts)
    taken = [0] * layer.router.num_experts
    rows = []
    for t in range(len(tokens)):
        y = torch.zeros_like(inputs[t])
        for k, expert in enumerate(experts[t].tolist()):
            taken[expert] += 1
            if taken[expert] <= capacity:
                y = y + weights[t, k] * feed_forward(inputs[t], layer.experts, expert)
        if layer.latent_out is not None:
            y = layer.latent_out.weight @ y
        if layer.shared is not None:
            shared = feed_forward(tokens[t], layer.shared, 0)
            y = y + (
                shared if layer.shared_gate is None else torch.sigmoid(layer.shared_gate.weight @ tokens[t]) * shared
            )
        rows.append(y)
    return torch.stack(rows).reshape(x.shape)


def randomise(module, seed=1):
    """Gives the parameters and buffers that start at zero or one a value that shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.split(".")[-1] in ("bias", "b_in", "b_out", "expert_scale", "selection_bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3 + 0.5)
    return module


def make(seed=0, dtype=WIDEST, **options):
    torch.manual_seed(seed)
    options.setdefault("router", {"renormalize": True})
    return randomise(nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, dtype=dtype, **options))


LAYERS = {
    "plain": {},
    "shared": {"shared_inner": 9},
    "shared_gate": {"shared_inner": 9, "shared_gate": True},
    "latent": {"latent": 6, "shared_inner": 3},
    "bias": {"bias": True},
    "not_gated": {"gated": False, "activation": "relu2", "bias": True},
    "gpt_oss": {"bias": True, "layout": "interleaved", "alpha": 1.702, "limit": 0.5, "up_offset": 1.0},
    "capacity": {"capacity_factor": 0.6},
    "loss_free": {"router": {"score": "sigmoid", "renormalize": True, "correction_bias": True, "scale": 2.5}},
    "router_bias": {"router": {"bias": True, "renormalize": True, "expert_scale": True}},
}


@pytest.mark.parametrize("impl", ["moe_ops", "naive"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_moe_matches_loop(options, impl, device):
    layer = make(impl=impl, **options).to(device)
    x = tokens(3, 5).to(device).requires_grad_()
    y, expected = layer(x), loop_moe(layer, x)
    assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert_same_gradients(y, expected, [x, *layer.parameters()])


def test_weight_on_input_scales_what_the_expert_sees(device):
    layer = make(weight_on="input", router={"score": "sigmoid"}).to(device)
    x = tokens(6).to(device)
    weights, experts = layer.router(x)
    expected = torch.stack(
        [
            sum(feed_forward(w * x[t], layer.experts, e) for w, e in zip(weights[t], experts[t].tolist(), strict=True))
            for t in range(6)
        ]
    )
    assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_drop_policy_reaches_plan(device):
    # One row per expert, two tokens that choose the same two experts in the opposite order: by position the first token
    # keeps both its slots, by choice each token keeps its first.
    layer = make(capacity_factor=EXPERTS / (2 * TOP_K))
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(EXPERTS, HIDDEN))
    x = torch.zeros(2, HIDDEN, dtype=WIDEST)
    x[0, :2] = torch.tensor([2.0, 1.0])
    x[1, :2] = torch.tensor([1.0, 2.0])
    layer, x = layer.to(device), x.to(device)
    weights, experts = layer.router(x)
    assert experts.tolist() == [[0, 1], [1, 0]]
    for policy, kept in (("position", [(0, 0), (0, 1)]), ("choice_first", [(0, 0), (1, 0)])):
        expected = torch.zeros_like(x)
        for t, k in kept:
            expected[t] += weights[t, k] * feed_forward(x[t], layer.experts, experts[t, k])
        layer.drop_policy = policy
        assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_router_returns_route_and_its_statistics(device):
    x = tokens(4, 3).to(device)
    segments = torch.arange(4, device=device).repeat_interleave(3)
    layer = make().to(device)
    y, result = layer(x, return_route=True, segments=segments, num_segments=4)
    weights, experts = loop_route(layer.router, x.reshape(-1, HIDDEN))
    assert torch.equal(y, layer(x))
    assert torch.equal(result.experts, experts.int())
    torch.testing.assert_close(result.weights, weights)
    logits = (x @ layer.router.weight.T).reshape(-1, EXPERTS)
    torch.testing.assert_close(result.logsumexp, logits.logsumexp(-1))
    torch.testing.assert_close(result.mean_prob, logits.softmax(-1).reshape(4, 3, EXPERTS).mean(1))
    counts = torch.stack([experts[segments == s].flatten().bincount(minlength=EXPERTS) for s in range(4)])
    assert torch.equal(result.counts, counts.int())


def test_moe_accepts_a_router_and_checks_its_sizes():
    router = nn.Router(HIDDEN, EXPERTS, 3, score="softmax_selected", dtype=WIDEST)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, 3, router=router, dtype=WIDEST)
    assert layer.router is router
    logits, chosen = (tokens(4) @ router.weight.T).topk(3)
    weights, experts = layer.router(tokens(4))
    assert torch.equal(experts, chosen.int())
    torch.testing.assert_close(weights, logits.softmax(-1))
    with pytest.raises(
        ValueError, match=r"MoE: router must have hidden, num_experts, top_k \(12, 5, 2\), got \(12, 5, 3\)"
    ):
        nn.MoE(HIDDEN, INNER, EXPERTS, 2, router=router)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,)])
@pytest.mark.parametrize("options", [LAYERS["shared_gate"], LAYERS["capacity"]], ids=["shared_gate", "capacity"])
def test_few_tokens(shape, options, device):
    layer = make(**options).to(device)
    x = tokens(*shape).to(device).requires_grad_()
    y, result = layer(x, return_route=True)
    assert y.shape == x.shape
    assert result.counts.sum() == x[..., 0].numel() * TOP_K
    y.sum().backward()
    if x.numel() == 0:
        assert not layer.experts.w_in.grad.any()
    else:
        assert_close(y, loop_moe(layer, x), rtol=1e-10, atol=1e-12)


def test_router_is_float32_under_autocast_and_with_bfloat16_weights():
    router = nn.Router(HIDDEN, EXPERTS, TOP_K, bias=True)
    x = tokens(64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, experts = router(x)
    assert weights.dtype == torch.float32
    for ours, expected in zip((weights, experts), router(x), strict=True):
        assert torch.equal(ours, expected)
    router.bfloat16()
    logits = router.logits(x.bfloat16())
    assert torch.equal(logits, F.linear(x.bfloat16().float(), router.weight.float(), router.bias.float()))


@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float32 weights"])
def test_bfloat16_is_as_accurate_as_plain_torch(how):
    layer = make(dtype=torch.float32, **LAYERS["shared_gate"])
    x = tokens(16, dtype=torch.float32)
    if how == "bfloat16":
        layer.bfloat16()
    if how != "autocast":
        x = x.bfloat16()
    naive = copy.deepcopy(layer)
    naive.experts.impl = naive.shared.impl = "naive"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y, eager = layer(x), naive(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(layer.router(x)[1], loop_route(copy.deepcopy(layer.router).double(), x.double())[1].int())
    expected = loop_moe(copy.deepcopy(layer).double(), x.double())
    rounding = (expected - expected.bfloat16().double()).abs().max()
    assert (y - expected).abs().max() <= 2 * (eager - expected).abs().max() + rounding
    y.float().square().sum().backward()
    assert all(parameter.grad.dtype == parameter.dtype for parameter in layer.parameters())


def test_loss_free_update_is_the_sign_of_the_missing_load():
    router = nn.Router(HIDDEN, 4, TOP_K, score="sigmoid", correction_bias=True)
    router.update_bias(torch.tensor([[6, 2, 0, 0], [2, 2, 4, 0]], dtype=torch.int32), 0.5)  # mean 4
    router.update_bias(torch.tensor([1, 1, 1, 5]), 0.125)  # mean 2
    assert router.selection_bias.tolist() == [-0.5 + 0.125, 0.125, 0.125, 0.5 - 0.125]
    assert not router.selection_bias.requires_grad
    with pytest.raises(ValueError, match=r"Router\.update_bias: the router must be built with correction_bias=True"):
        nn.Router(HIDDEN, 4, TOP_K).update_bias(torch.tensor([1, 1, 1, 5]), 0.1)


def test_loss_free_update_evens_out_the_load():
    torch.manual_seed(0)
    router = nn.Router(HIDDEN, EXPERTS, TOP_K, bias=True, score="sigmoid", correction_bias=True)
    with torch.no_grad():
        router.bias.copy_(torch.linspace(-2, 2, EXPERTS))
    x = tokens(500, dtype=torch.float32)

    def imbalance():
        counts = router(x, stats=True).counts
        router.update_bias(counts, 0.01)
        return (counts.max() / counts.float().mean()).item()

    before = imbalance()
    after = [imbalance() for _ in range(100)][-1]
    assert before > 2
    assert after < 1.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_selection_bias_stays_float32(dtype):
    router = randomise(nn.Router(HIDDEN, EXPERTS, TOP_K, correction_bias=True))
    before = router.selection_bias.clone()
    router.to(dtype)
    assert router.weight.dtype == dtype
    assert torch.equal(router.selection_bias, before)
    assert torch.equal(router.state_dict()["selection_bias"], before)


def test_jitter_multiplies_what_the_router_sees_in_training_only():
    router = nn.Router(1, 1, 1, jitter=0.25)
    x = torch.ones(1000, 1)
    noise = router.logits(x) / router.weight
    assert 0.75 <= noise.min() < 0.8
    assert 1.2 < noise.max() <= 1.25
    assert torch.equal(router.eval().logits(x), router.weight.expand(1000, 1))


def test_jitter_leaves_the_experts_input_alone():
    # One expert, weight 1: only the router could show the noise.
    layer = nn.MoE(HIDDEN, INNER, 1, 1, router={"jitter": 0.5})
    x = tokens(8, dtype=torch.float32)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_initialisation_repeats_with_the_seed_and_is_that_of_linear():
    first, second = (nn.MoE(64, 32, 4, 2, bias=True, router={"bias": True}) for _ in range(2) if torch.manual_seed(7))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    for weight, fan_in in ((first.router.weight, 64), (first.experts.w_in, 64), (first.experts.w_out, 32)):
        bound = fan_in**-0.5
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.1
    for bias in (first.router.bias, first.experts.b_in, first.experts.b_out):
        assert not bias.any()


OPTIONS = {"shared_inner": 9, "shared_gate": True, "latent": 6, "bias": True, "router": {"correction_bias": True}}


def test_state_dict_round_trip():
    source, target = make(**OPTIONS), make(seed=9, **OPTIONS)
    randomise(target, seed=10)
    x = tokens(6)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))
    assert sorted(source.state_dict()) == [
        "experts.b_in",
        "experts.b_out",
        "experts.w_in",
        "experts.w_out",
        "latent_in.weight",
        "latent_out.weight",
        "router.selection_bias",
        "router.weight",
        "shared.b_in",
        "shared.b_out",
        "shared.w_in",
        "shared.w_out",
        "shared_gate.weight",
    ]


def test_meta_device_construction():
    with torch.device("meta"):
        layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, dtype=torch.bfloat16, **OPTIONS)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    source = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, dtype=torch.bfloat16, **OPTIONS)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert layer.router.selection_bias.dtype == torch.float32
    x = tokens(6, dtype=torch.bfloat16)
    assert torch.equal(layer(x), source(x))


def test_reset_parameters_after_meta_draws_what_the_constructor_draws():
    torch.manual_seed(3)
    source = nn.Experts(EXPERTS, HIDDEN, INNER, bias=True)
    layer = nn.Experts(EXPERTS, HIDDEN, INNER, bias=True, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    for ours, expected in zip(layer.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_compiles_as_one_graph_for_any_number_of_tokens():
    layer = make(dtype=torch.float32, **LAYERS["shared_gate"], capacity_factor=1.1)
    torch._dynamo.reset()  # of other tests' layers, which share the code
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(count):
        x = tokens(count, dtype=torch.float32)
        assert torch.equal(compiled(x), layer(x))

    with torch._dynamo.config.patch(error_on_recompile=True):  # the capacity is no constant of the graph
        for count in (9, 33, 17):
            check(count)
    for count in (1, 0):
        check(count)


def test_exports_with_a_dynamic_number_of_tokens():
    layer = make(dtype=torch.float32, **LAYERS["shared_gate"], capacity_factor=1.0)
    exported = torch.export.export(
        layer, (tokens(9, dtype=torch.float32),), dynamic_shapes={"x": {0: torch.export.Dim("tokens", max=4096)}}
    )
    for count in (9, 33, 2):
        x = tokens(count, dtype=torch.float32)
        assert torch.equal(exported.module()(x), layer(x))


@pytest.mark.parametrize(
    ("factor", "count", "rows"),
    [(None, 40, None), (1.0, 40, 10), (1.1, 200, 55), (0.5, 41, 6), (1e-9, 1, 1), (2, 0, 0)],
)
def test_capacity_is_exact(factor, count, rows):
    # Two choices, eight experts: 40 tokens are 10 rows each; in floating point 1.1 · 200 · 2 / 8 is above 55.
    assert nn.MoE(HIDDEN, INNER, 8, 2, capacity_factor=factor).capacity(count) == rows
