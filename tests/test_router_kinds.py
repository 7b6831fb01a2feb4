"""Hash, hierarchical and SparseMixer routers against their papers' formulas in plain torch."""

import pytest
import torch
from torch.nn import functional as F

from accuracy import assert_close
from cases import WIDEST
from layers import ATOL, EXPERTS, HIDDEN, INNER, RTOL, TOP_K, assert_same_gradients, build, dense_moe, tokens
from moe_ops import nn

# ---- hash -----------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 0, 9], [9, -1, 10]])  # of a vocabulary of 10: the last two are unknown


@pytest.mark.parametrize("score", ["uniform", "softmax", "sigmoid", "sqrtsoftplus"])
def test_hash_layer_matches_table(score, device):
    router = build(nn.HashRouter, EXPERTS, TOP_K, 10, score=score, scale=1.5)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, TOP_K, router=router, dtype=WIDEST).to(device)
    x = tokens(2, 3).to(device).requires_grad_()
    flat = x.reshape(6, HIDDEN)
    gates = torch.zeros(6, EXPERTS, dtype=WIDEST, device=device)
    for t, token in enumerate(IDS.flatten().tolist()):
        if not 0 <= token < 10:
            continue
        chosen = router.table[token].long()
        if score == "uniform":
            weights = torch.full((TOP_K,), 1.5 / TOP_K, dtype=WIDEST, device=device)
        else:
            logits = router.weight @ flat[t]
            scores = {
                "softmax": lambda z: z.softmax(0),
                "sigmoid": torch.sigmoid,
                "sqrtsoftplus": lambda z: F.softplus(z).sqrt(),
            }[score](logits)[chosen]
            weights = 1.5 * scores / scores.sum()
        gates = gates.index_put((torch.tensor(t, device=device), chosen), weights)
    y, result = layer(x, return_route=True, token_ids=IDS.to(device))
    expected = dense_moe(layer, flat, gates).reshape(x.shape)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert not y[1, 1:].any()
    assert result.counts.tolist() == [(gates > 0).sum(0).tolist()]
    assert_same_gradients(y, expected, [x, *layer.parameters()])


def test_hash_table_is_state_and_repeats_with_the_seed():
    first, second = (build(nn.HashRouter, EXPERTS, TOP_K, 50, seed=4) for _ in range(2))
    other = build(nn.HashRouter, EXPERTS, TOP_K, 50, seed=5)
    assert torch.equal(first.table, second.table)
    assert not torch.equal(first.table, other.table)
    assert sorted(first.state_dict()) == ["table"]
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.table, other.table)
    assert all(len(set(row)) == TOP_K for row in first.table.tolist())
    assert set(first.table.flatten().tolist()) == set(range(EXPERTS))


def test_hash_needs_token_ids():
    router = build(nn.HashRouter, EXPERTS, TOP_K, 10)
    with pytest.raises(ValueError, match=r"^HashRouter: token_ids must be given, got None"):
        router(tokens(3))


def test_balanced_table_evens_out_the_text():
    frequencies = 1000 / torch.arange(1, 201)  # Zipf
    table = nn.balanced_table(frequencies.flip(0), 4).flatten()
    share = torch.zeros(4).index_add(0, table.long(), frequencies.flip(0)) / frequencies.sum()
    assert share.max() < 1.02 * share.min()
    assert nn.balanced_table(torch.tensor([5, 9, 1, 4]), 2).tolist() == [[1], [0], [0], [1]]  # 9 | 5 4 | 1
    assert nn.balanced_table(torch.tensor([2, 1]), 3, 2).tolist() == [[0, 1], [2, 0]]


# ---- hierarchical ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "softmax_selected"])
@pytest.mark.parametrize("top_groups", [1, 2, 4])
def test_hierarchical_is_the_product_of_two_gates(top_groups, score, device):
    groups, held, top_k = 4, 3, 2 if top_groups == 1 else 4
    router = build(nn.HierarchicalRouter, groups * held, top_k, (groups, top_groups), score=score, bias=True)
    router.to(device)
    torch.nn.init.normal_(router.bias)
    each = router.top_k // top_groups
    x = tokens(7).to(device).requires_grad_()
    first = x @ router.group_weight.T
    second = (x @ router.weight.T + router.bias).unflatten(1, (groups, held))
    gates = torch.zeros(7, groups * held, dtype=WIDEST, device=device)

    def gate(logits, k):
        top = logits.topk(k)
        return top.indices, top.values.softmax(0) if score == "softmax_selected" else logits.softmax(0)[top.indices]

    for t in range(7):
        chosen, p_group = gate(first[t], top_groups)
        for g, p in zip(chosen.tolist(), p_group, strict=True):
            inside, p_expert = gate(second[t, g], each)
            at = torch.tensor(t, device=device), g * held + inside
            gates = gates.index_put(at, p * p_expert)
    segments = torch.tensor([0, 0, 1, 1, 1, 0, 1], device=device)
    result = router(x, stats=True, segments=segments, num_segments=2)
    ours = torch.zeros_like(gates).scatter(1, result.experts.long(), result.weights)
    assert_close(ours, gates, rtol=RTOL, atol=ATOL)
    assert result.counts.tolist() == [(gates[segments == s] > 0).sum(0).tolist() for s in range(2)]
    wanted = [x, router.weight, router.bias, router.group_weight]
    if score == "softmax":
        assert_same_gradients(ours, gates, wanted)
    product = (first.softmax(1).unsqueeze(2) * second.softmax(2)).flatten(1)
    prob = torch.stack([product[segments == s].mean(0) for s in range(2)])
    assert_close(result.mean_prob, prob, rtol=RTOL, atol=ATOL)
    assert_same_gradients(result.mean_prob, prob, wanted)
    logsumexp = torch.cat([first, second.flatten(1)], 1).exp().sum(1).log()
    assert_close(result.logsumexp, logsumexp, rtol=RTOL, atol=ATOL)


def test_hierarchical_layer(device):
    router = build(nn.HierarchicalRouter, 6, 2, (3, 2))
    layer = nn.MoE(HIDDEN, INNER, 6, 2, router=router, dtype=WIDEST).to(device)
    x = tokens(5).to(device).requires_grad_()
    weights, experts = router(x)
    expected = dense_moe(layer, x, torch.zeros(5, 6, dtype=WIDEST, device=device).scatter(1, experts.long(), weights))
    y = layer(x)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert_same_gradients(y, expected, [x, *layer.parameters()])


# ---- SparseMixer ----------------------------------------------------------------------------------------------------


def close_logits(seed=0):
    """Logits near enough that several experts pass the threshold of 0.1."""
    logits = 3 + 0.2 * torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))
    return logits.requires_grad_()


def identity_mixer(top_k=2):
    """A router whose logits are its tokens."""
    router = nn.SparseMixerRouter(8, 8, top_k, threshold=0.1)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))
    return router


@pytest.mark.parametrize("training", [False, True])
def test_sparse_mixer_is_transformers(training):
    phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    router = identity_mixer().train(training)
    ours, theirs = close_logits(), close_logits()
    torch.manual_seed(1)
    weights, experts = router(ours)
    torch.manual_seed(1)
    multiplier, selected = phimoe.sparsemixer(theirs, 0.1, training)
    assert torch.equal(experts.long(), selected)
    torch.testing.assert_close(weights[:, 0], multiplier[:, 0])
    # For its second midpoint transformers draws twice and uses the second draw: the factor may differ, nothing else.
    ratio = weights[:, 1] / multiplier[:, 1]
    one = torch.ones(200)
    nearest = torch.stack([ratio - one, ratio - 0.3333, ratio - 1 / 0.3333]).abs().amin(0)
    assert nearest.max() < 1e-4
    assert training or (ratio - 1).abs().max() < 1e-5
    grad = torch.randn(200, 2, generator=torch.Generator().manual_seed(2))
    weights.backward(grad)
    multiplier.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad)
    if training:
        assert (experts[:, 0] != ours.argmax(1)).float().mean() > 0.2
    else:
        assert torch.equal(experts[:, 0].long(), ours.argmax(1))


def test_sparse_mixer_samples_by_probability_and_scales_by_heun():
    router = identity_mixer(top_k=1)
    row = torch.tensor([3.0, 2.9, 2.8, 2.0, 1.0, 0.0, -1.0, -9.0])  # the first three are within 20 %
    weights, experts = router(row.expand(20000, 8))
    share = torch.bincount(experts[:, 0].long(), minlength=8) / 20000
    probability = torch.cat([row[:3].softmax(0), torch.zeros(5)])
    assert (share - probability).abs().max() < 0.02
    factor = weights[:, 0] / probability[experts[:, 0].long()]
    best = experts[:, 0] == 0
    torch.testing.assert_close(factor[best], torch.ones(int(best.sum())))
    full = (factor[~best] - 1).abs() < 1e-4
    assert ((factor[~best] - 0.3333).abs() < 1e-4).logical_xor(full).all()
    assert abs(full.float().mean() - 0.25) < 0.02


def test_sparse_mixer_layer_trains(device):
    router = build(nn.SparseMixerRouter, EXPERTS, 2)
    layer = nn.MoE(HIDDEN, INNER, EXPERTS, 2, router=router, dtype=WIDEST).to(device)
    x = tokens(30).to(device).requires_grad_()
    torch.manual_seed(0)
    y, result = layer(x, return_route=True)
    gates = torch.zeros(30, EXPERTS, dtype=WIDEST, device=device).scatter(1, result.experts.long(), result.weights)
    expected = dense_moe(layer, x, gates)
    assert_close(y, expected, rtol=RTOL, atol=ATOL)
    assert result.counts.tolist() == [(gates > 0).sum(0).tolist()]
    assert (result.experts[:, 0] != result.experts[:, 1]).all()
    assert_same_gradients(y, expected, list(layer.experts.parameters()))


@pytest.mark.parametrize(
    ("kind", "args", "options"),
    [
        (nn.SwitchRouter, (EXPERTS,), {"jitter": 0.0}),
        (nn.ExpertChoiceRouter, (EXPERTS, TOP_K), {}),
        (nn.HashRouter, (EXPERTS, TOP_K, 64), {"score": "sqrtsoftplus"}),
        (nn.HierarchicalRouter, (6, 2, (3, 2)), {}),
        (nn.NoisyTopKRouter, (EXPERTS, TOP_K), {}),
        (nn.SparseMixerRouter, (EXPERTS, TOP_K), {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_routers_compile_stay_float32_and_keep_their_state(kind, args, options, device):
    torch.manual_seed(0)
    router = kind(HIDDEN, *args, **options).eval()
    layer = nn.MoE(HIDDEN, INNER, router.num_experts, router.top_k, router=router).to(device).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (9, 33, 17):
        x, ids = tokens(count, dtype=torch.float32).to(device), torch.arange(count, device=device)
        ours, route = compiled(x, return_route=True, token_ids=ids)
        expected, eager = layer(x, return_route=True, token_ids=ids)
        assert torch.equal(route.experts, eager.experts)
        torch.testing.assert_close(ours, expected)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        weights, experts = router(x, token_ids=ids)
    assert weights.dtype == torch.float32
    assert torch.equal(experts, eager.experts)
    torch.testing.assert_close(weights, eager.weights, rtol=0, atol=0)
    copy = kind(HIDDEN, *args, **options).to(device).eval()
    copy.load_state_dict(router.state_dict())
    assert torch.equal(copy(x, token_ids=ids)[0], weights)
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in kind(HIDDEN, *args, **options).state_dict().values())
