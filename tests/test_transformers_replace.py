"""replace: models that are no plug-in, before and after; and enable(router=True)."""

import copy
import pickle
import threading

import pytest
import torch

from transformers_models import (
    TOLERANCE,
    assert_bfloat16,
    assert_same,
    draw,
    greedy_text,
    ids,
    logits_and_gradients,
    one_thread,
    tiny_model,
)

pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed (extra [transformers])")

from moe_ops.integrations.transformers import Report, enable, replace
from moe_ops.integrations.transformers.routers import replace_routers


@pytest.fixture(autouse=True)
def threads():
    with one_thread():
        yield


FAMILIES = ["dbrx", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7", "switch_transformers"]


@pytest.mark.parametrize("family", FAMILIES)
def test_replace(family, record_property):
    """Logits, the gradients of all parameters that kept their names, and of the stacked ones as a sum; greedy text."""
    model, tokens = tiny_model(family), ids()
    eager, eager_gradients = logits_and_gradients(model, tokens)
    assert eager.std() > 1e-3
    text = greedy_text(model, tokens)
    before = sum(parameter.numel() for parameter in model.parameters())
    report = replace(model)
    assert report.replaced, report
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    ours, gradients = logits_and_gradients(model, tokens)
    assert torch.equal(greedy_text(model, tokens), text)
    same = eager_gradients.keys() & gradients.keys()
    assert len(same) > len(gradients) / 2
    common = [{name: values[name] for name in same} for values in (gradients, eager_gradients)]
    assert_same(family, tokens, (ours, common[0]), (eager, common[1]))
    # What lies otherwise now: the same numbers, so the same norm.
    theirs = sum(v.double().square().sum() for k, v in eager_gradients.items() if k not in same)
    mine = sum(v.double().square().sum() for k, v in gradients.items() if k not in same)
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-5, atol=0)
    again = replace(model)
    assert not again.replaced and set(again.left.values()) >= {"was replaced before"}
    record_property("class", type(model).__name__)
    record_property("text", "yes")


@pytest.mark.long_emulated
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    assert_bfloat16(family, replace)


def test_replace_is_used():
    """A wrong weight is seen."""
    model, tokens = tiny_model("dbrx"), ids()
    replace(model)
    with torch.no_grad():
        before = model(tokens).logits
        model.get_submodule("transformer.blocks.0.ffn.experts").w_out.mul_(1.01)
        assert (model(tokens).logits - before).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("limit", [None, 0.5])
def test_step3p7(limit):
    from types import SimpleNamespace

    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = SimpleNamespace(num_local_experts=8, hidden_size=24, moe_intermediate_size=20, hidden_act="silu")
    theirs = draw(torch.nn.Sequential(Step3p7Experts(config, limit)))
    ours = copy.deepcopy(theirs)
    assert "0" in replace(ours).replaced
    x, chosen, weights = torch.randn(40, 24), torch.rand(40, 8).topk(3).indices, torch.rand(40, 3)
    results = []
    for experts in (ours[0], theirs[0]):
        y = experts(x, chosen, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def test_replace_leaves_plugins():
    model = tiny_model("mixtral")
    report = replace(model)
    assert not report.replaced
    assert all("set_experts_implementation" in why for why in report.left.values()) and len(report.left) == 2
    with pytest.raises(TypeError, match=r"transformers\.replace: model must be a torch\.nn\.Module, got str"):
        replace("mixtral")


def test_a_model_with_replaced_routers_can_be_pickled():
    model = tiny_model("mixtral")
    assert enable(model, router=True).replaced
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    routers = [module for module in again.modules() if hasattr(module, "_moe_ops_said")]
    assert routers and all(router.forward.args == (router,) for router in routers)


class CountingRouter(torch.nn.Module):
    """A router that keeps a count of its tokens, or does not."""

    def __init__(self, counts):
        super().__init__()
        self.weight, self.counts = torch.nn.Parameter(torch.randn(8, 16)), counts
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        logits = x @ self.weight.T
        self.seen += len(x) if self.counts else 0
        weights, ids = logits.softmax(-1).topk(2)
        return logits, weights, ids


def test_hooks_and_buffers_of_routers():
    """A router's hooks do not see what it is measured with, and need not be copied; they run afterwards as before."""
    router, seen, lock = CountingRouter(False), [], threading.Lock()

    class Recorder:
        def __init__(self):
            self.lock = lock  # cannot be copied

        def hook(self, module, args, output):
            seen.append(len(args[0]))

    router.register_forward_hook(Recorder().hook)
    model = torch.nn.ModuleDict({"router": router})
    x = torch.randn(5, 16)
    expected = router(x)
    report = Report()
    replace_routers(model, report)
    assert "router" in report.replaced, report
    assert seen == [5]
    for ours, theirs in zip(router(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert seen == [5, 5]
    report = Report()
    replace_routers(torch.nn.ModuleDict({"router": CountingRouter(True)}), report)
    assert report.left == {"router": "changes its buffers"}


def test_routers_of_new_models():
    report = enable(router=True)
    try:
        tiny_model("mixtral")
    finally:
        enable()
    assert len(report.replaced) >= 1 and "renormalize=True" in str(report)
    with pytest.raises(TypeError, match=r"transformers\.enable: router must be True or False"):
        enable(router=1)
