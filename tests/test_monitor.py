"""RouterHealth against loops over tokens, with and without hooks."""

import copy
import math

import pytest
import torch

import moe_ops
import ranks
from accuracy import assert_bitwise_equal
from cases import randn
from moe_ops import RouterHealth, RouterReplay, nn
from monitored import EXPERTS, HIDDEN, TOKENS, TOP_K, layers


def chosen(model, x):
    """[tokens, top_k] of each layer, by plain torch; tokens dropped everywhere tie in the second."""
    with torch.no_grad():
        logits = x @ model[0].router.weight.T, model[0](x) @ model[1].router.weight.T
    return [z.cpu().sort(dim=1, descending=True, stable=True).indices[:, :TOP_K] for z in logits]


def test_figures_are_those_of_a_loop(device):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=1).to(device)
    expected = chosen(model, x)
    health = RouterHealth(model, coactivation=True)
    plain = model(x)
    assert isinstance(plain, torch.Tensor)
    health.step()
    for name, ids in zip(("0", "1"), expected):
        counts = [int((ids == e).sum()) for e in range(EXPERTS)]
        share = [c / (TOKENS * TOP_K) for c in counts]
        capacity = math.ceil(TOKENS * TOP_K / EXPERTS)
        summary = health.summary()[name]
        assert summary.tokens == TOKENS
        assert summary.load == pytest.approx([s * EXPERTS for s in share])
        assert summary.max_over_mean == pytest.approx(max(share) * EXPERTS)
        assert summary.entropy == pytest.approx(-sum(s * math.log(s) for s in share if s) / math.log(EXPERTS))
        assert summary.dead == counts.count(0)
        assert summary.dropped == pytest.approx(sum(max(c - capacity, 0) for c in counts) / (TOKENS * TOP_K))
        assert health.layers[name].history[0].tolist() == counts
        together = health.together(name)
        for a in range(EXPERTS):
            for b in range(EXPERTS):
                both = sum(a in row and b in row for row in ids.tolist())
                chance = counts[a] * counts[b] / TOKENS
                assert float(together[a, b]) == pytest.approx(both / chance if chance else 0)
    lse = torch.logsumexp(x.double() @ model[0].router.weight.double().T, 1)
    assert health.summary()["0"].logsumexp_rms == pytest.approx(lse.square().mean().sqrt().item(), rel=1e-4)
    assert health.summary()["0"].logsumexp_max == pytest.approx(lse.abs().max().item(), rel=1e-4)


def test_dropped_slots_are_those_of_the_plan(device):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=1).to(device)
    health = RouterHealth(model)
    model(x)
    _, experts = model[0].router(x)
    plan = moe_ops.plan(experts, EXPERTS, capacity=model[0].capacity(TOKENS))
    lost = TOKENS * TOP_K - int(plan.offsets[-1])
    assert lost > 0
    assert health.summary()["0"].dropped * TOKENS * TOP_K == pytest.approx(lost)


def test_watching_changes_nothing_and_ends(device):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=2).to(device)
    expected = model(x)
    health = RouterHealth(model)
    assert_bitwise_equal(model(x), expected)
    y, route = model[0](x, return_route=True)
    assert isinstance(route, moe_ops.RouteResult) and y.shape == x.shape
    assert health.summary()["0"].tokens == 2 * TOKENS and health.summary()["1"].tokens == TOKENS
    with health.pause():
        model(x)
    health.detach()
    model(x)
    assert health.summary()["1"].tokens == TOKENS
    health.reset()
    assert health.summary() == {} and not model[0].router._forward_hooks


def test_classes_are_kept_apart(device):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=3).to(device)
    ids = (torch.arange(TOKENS) % 3).to(device)  # 2 is no class
    health = RouterHealth(model, classes=("even", "odd"))
    with health.token_classes(ids):
        model(x)
    share = health.specialisation("0")
    with health.pause():
        first = chosen(model, x)[0]
    for c in range(2):
        mine = first[ids.cpu() == c]
        assert share[c].tolist() == pytest.approx([int((mine == e).sum()) / mine.numel() for e in range(EXPERTS)])
    with pytest.raises(ValueError, match=r"token_classes: ids must be one per token \(40\), got none"):
        model(x)
    with pytest.raises(ValueError, match=r"must be built with classes, got none"), RouterHealth().token_classes(ids):
        pass


def test_update_by_hand_takes_results_and_pairs(device):
    logits = randn(TOKENS, EXPERTS, seed=4).to(device)
    by_result, by_pair = RouterHealth(), RouterHealth()
    by_result.update("a", moe_ops.route(logits, TOP_K, stats=True))
    by_pair.update("a", moe_ops.route(logits, TOP_K), EXPERTS)
    assert by_result.summary()["a"].load == by_pair.summary()["a"].load
    assert math.isnan(by_pair.summary()["a"].logsumexp_rms)
    by_pair.update("a", moe_ops.route(logits, TOP_K), EXPERTS)
    assert by_pair.summary()["a"].tokens == 2 * TOKENS
    with pytest.raises(TypeError, match=r"RouterHealth.update: num_experts must be"):
        by_pair.update("b", moe_ops.route(logits, TOP_K))
    with pytest.raises(ValueError, match=r"RouterHealth.together: name must be one of a, got 'c'"):
        by_pair.together("c")
    with pytest.raises(ValueError, match=r"must be built with coactivation=True"):
        by_pair.together("a")
    with pytest.raises(ValueError, match=r"must have a moe_ops.nn router or experts of transformers, got none"):
        RouterHealth(torch.nn.Linear(2, 2))


def test_update_refuses_what_it_cannot_count():
    health, ids = RouterHealth(), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"update: route must be a pair \(weights, experts\) or a RouteResult, got int"):
        health.update("a", 3)
    with pytest.raises(TypeError, match=r"update: experts must be of dtype int32 or int64, got float32"):
        health.update("a", (ids, ids.float()), 4)
    health.update("a", (ids, ids), 4)
    with pytest.raises(TypeError, match=r"update: capacity must be an int, got str 'x'"):
        health.update("a", (ids, ids), 4, capacity="x")
    with pytest.raises(TypeError, match=r"token_classes: ids must be a Tensor, got list"):
        RouterHealth(classes=["noun"]).token_classes([0]).__enter__()
    with pytest.raises(ValueError, match=r"update: num_experts must be 4 as before for 'a', got 5"):
        health.update("a", (ids, ids), 5)


def test_experts_that_do_not_compute_drop_nothing(device):
    more = nn.ZeroComputationExperts(HIDDEN, zero=1, skip=1)
    layer = nn.MoE(HIDDEN, 8, EXPERTS, 1, zero_computation=more, capacity_factor=1.0).to(device)
    health = RouterHealth(layer)
    with torch.no_grad():
        layer.router.weight.zero_()[-1] = 1.0
    layer(torch.ones(TOKENS, HIDDEN, device=device))
    (summary,) = health.summary().values()
    assert summary.load == [0.0] * (EXPERTS + 1) + [EXPERTS + 2.0] and summary.dropped == 0
    with torch.no_grad():
        layer.router.weight.zero_()[0] = 1.0
    health.reset()
    layer(torch.ones(TOKENS, HIDDEN, device=device))
    (summary,) = health.summary().values()
    assert summary.dropped == 1 - math.ceil(TOKENS / (EXPERTS + 2)) / TOKENS


def test_routers_of_a_cascade_are_watched_and_replayed(device):
    steps = [nn.NoisyTopKRouter(HIDDEN, EXPERTS, TOP_K) for _ in range(2)]
    model, x = nn.Cascade(nn.Experts(EXPERTS, HIDDEN, 8), steps).to(device), randn(TOKENS, HIDDEN, seed=13).to(device)
    health, replay = RouterHealth(model), RouterReplay(model)
    with replay.record():
        expected, routes = model(x, return_route=True)
    for name, route in zip(("routers.0", "routers.1"), routes, strict=True):
        summary = health.summary()[name]
        assert summary.load == pytest.approx((route.counts[0] * EXPERTS / (TOKENS * TOP_K)).tolist())
        assert summary.logsumexp_max == pytest.approx(route.logsumexp.abs().max().item())
    with replay.play(weights="recorded"):
        played, again = model(x, return_route=True)
    assert_bitwise_equal(played, expected)
    assert all(torch.equal(a.counts, b.counts) for a, b in zip(again, routes, strict=True))


def test_a_copy_of_the_model_is_not_watched():
    model, x = layers("cpu"), randn(TOKENS, HIDDEN, seed=14)
    health = RouterHealth(model)
    assert_bitwise_equal(copy.deepcopy(model)(x), model(x))
    assert health.summary()["0"].tokens == TOKENS


def test_sums_of_inference_mode_go_on_in_training():
    model, x = layers("cpu"), randn(TOKENS, HIDDEN, seed=15)
    health = RouterHealth(model)
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert health.summary()["1"].tokens == 2 * TOKENS


def test_nothing_waits_for_the_device():
    """On the meta device there is nothing to wait for: reading a value would raise."""
    with torch.device("meta"):
        model = nn.MoE(HIDDEN, 8, EXPERTS, TOP_K)
        health = RouterHealth(model, coactivation=True)
        model(torch.empty(TOKENS, HIDDEN))
        health.step()
    assert health.layers["router"].by_class.device.type == "meta"


def test_table_and_plot(device, tmp_path, monkeypatch):
    model, x = layers(device), randn(TOKENS, HIDDEN, seed=5).to(device)
    health = RouterHealth(model, classes=("even", "odd"))
    for _ in range(3):
        with health.token_classes(torch.arange(TOKENS) % 2):
            model(x)
        health.step()
    head, first, second = health.table().splitlines()
    assert head.split()[:4] == ["layer", "tokens", "max/mean", "entropy"]
    assert first.split()[:2] == ["0", str(3 * TOKENS)] and second.split()[0] == "1"
    assert len(first.split()[-1]) == EXPERTS
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    health.plot(str(tmp_path / "health.png"))
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was counted yet"):
        RouterHealth().plot("x.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"RouterHealth.plot: needs matplotlib: pip install matplotlib"):
        health.plot("x.png")


def test_bars():
    from moe_ops.monitor.show import bars

    assert bars([0.0, 0.01, 1.0, 2.5]) == "·▁▄█"
    assert len(bars([1.0] * 500)) == 32 and bars([3.0] + [0.0] * 400)[0] == "█" and bars([3.0] + [0.0] * 400)[-1] == "·"


def test_transformers_experts_are_overheard():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=4, vocab_size=30,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    health = RouterHealth(model)
    model(torch.arange(20)[None])
    summaries = health.summary()
    assert len(summaries) == 2
    for summary in summaries.values():
        assert summary.tokens == 20 and sum(summary.load) == pytest.approx(4)


@pytest.mark.parametrize("family", ["dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers"])
def test_layers_that_were_replaced_are_seen(family):
    """As many tokens and slots as the model has, until detached."""
    pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed")
    from moe_ops.integrations.transformers import replace
    from transformers_models import ids, logits_of, tiny_model

    model, tokens = tiny_model(family), ids()
    report = replace(model)
    health = RouterHealth(model)
    logits_of(model, tokens)
    summaries = health.summary()
    assert set(summaries) == {name.removesuffix(".experts") for name in report.replaced}
    top_k = 1 if family == "switch_transformers" else 2
    for name, summary in summaries.items():
        counts = health.layers[name].by_class.sum()
        assert summary.tokens == tokens.numel() and 0 < counts <= tokens.numel() * top_k
        assert family == "switch_transformers" or counts == tokens.numel() * top_k  # it drops beyond its capacity
    health.detach()
    logits_of(model, tokens)
    assert health.summary() == summaries
    other = RouterHealth(copy.deepcopy(model))
    logits_of(model, tokens)
    assert not other.summary()


def read_on_two():
    rank = torch.distributed.get_rank()
    model, x = layers("cpu"), randn(TOKENS, HIDDEN, seed=21)
    group = torch.distributed.group.WORLD
    health = RouterHealth(model, coactivation=True, group=group)
    with torch.no_grad():
        model[0](x[rank * 10 : 10 + rank * 30])  # 10 and 30 tokens
    health.step()
    read = health.summary(), health.together("0"), health.history("0"), health.table()
    # Only one rank sees the other layer, and closes a step more.
    if rank == 1:
        with torch.no_grad():
            model[1](x)
        health.step()
    later = health.summary()["1"].tokens, health.history("1"), health.history("0")
    with pytest.raises(ValueError, match=r"^RouterHealth.history: name must be one of 0, 1, got '2'"):
        health.history("2")
    return *read, later


def test_two_ranks_read_as_one_with_all_tokens(pytestconfig):
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("the ranks are processes on a CPU")
    first, second = ranks.run(2, read_on_two)
    model = layers("cpu")
    model[0].capacity_factor = None
    alone = RouterHealth(model, coactivation=True)
    with torch.no_grad():
        model[0](randn(TOKENS, HIDDEN, seed=21))
    expected, got = alone.summary()["0"], first[0]["0"]
    assert first[0] == second[0] and first[3] == second[3]
    assert (got.tokens, got.load, got.dead) == (expected.tokens, expected.load, expected.dead)
    assert got.logsumexp_rms == pytest.approx(expected.logsumexp_rms)
    assert got.logsumexp_max == pytest.approx(expected.logsumexp_max)
    torch.testing.assert_close(first[1], alone.together("0"))
    assert first[2].tolist() == alone.history("0").tolist()
    for tokens, of_other, of_first in (first[4], second[4]):
        assert tokens == TOKENS and of_other.sum() == TOKENS * model[1].router.top_k
        # The last step of both ranks is one: that of the first rank is its only one.
        assert of_first.sum() == first[2].sum() and of_first.shape[0] == 2


def test_trainer_callback():
    """As Trainer calls it: after a step, then with the logs."""
    trainer = pytest.importorskip("transformers.trainer_callback", reason="transformers is not installed")
    model, x, reports = layers("cpu"), randn(TOKENS, HIDDEN, seed=6), []
    health = RouterHealth(model)
    callback = health.trainer_callback(reports.append)
    assert isinstance(callback, trainer.TrainerCallback)
    state = trainer.TrainerState(log_history=[{"loss": 1.0}])
    model(x)
    callback.on_step_end(None, state, None)
    expected = health.summary()
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs)
    assert logs["router/max_over_mean"] == max(s.max_over_mean for s in expected.values())
    assert logs["router/entropy"] == min(s.entropy for s in expected.values())
    assert logs == {"loss": 1.0} | reports[0] and state.log_history[-1] == logs
    assert health.summary() == {}


def test_names_of_layers_and_classes():
    health = RouterHealth(coactivation=True)
    with pytest.raises(ValueError, match=r"^RouterHealth.together: name must be one of the layers seen, .* none yet"):
        health.together("layer")
    with pytest.raises(TypeError, match=r"^RouterHealth: classes must be a sequence of names, got the str 'abc'"):
        RouterHealth(classes="abc")
