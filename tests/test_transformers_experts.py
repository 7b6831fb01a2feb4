"""transformers' experts interface on moe_ops: every experts class alone."""

import pytest
import torch

from accuracy import assert_as_accurate
from transformers_families import experts_classes, module_of
from transformers_models import TOLERANCE, Permissive, draw, one_thread

pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed (extra [transformers])")

from moe_ops.integrations.transformers import enable, gates

TWO_PRODUCTS = {"Inkling2Experts", "Inkling2LoopExperts", "MuseSparkExperts"}  # a soft-capped gate; a norm per expert


@pytest.fixture(autouse=True)
def enabled():
    enable()
    with one_thread():
        yield


def run(experts, implementation, x, chosen, weights, gradient):
    experts.config._experts_implementation = implementation
    leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
    y = experts(leaves[0], chosen, leaves[1])
    return y, *torch.autograd.grad(y, [*leaves, *experts.parameters()], gradient.to(y.dtype))


def build(family, name, dtype=torch.float32, **config):
    experts = draw(getattr(module_of(family), name)(Permissive(**config)))
    generator = torch.Generator().manual_seed(4)
    x, gradient = (torch.randn(50, 24, generator=generator).to(dtype) for _ in range(2))
    chosen = torch.rand(50, 8, generator=generator).topk(3).indices
    weights = torch.rand(50, 3, generator=generator)
    return experts.to(dtype), (x, chosen, weights.to(dtype), gradient)


@pytest.mark.parametrize("family, name", experts_classes())
def test_experts_class(family, name):
    """y, and the gradients of tokens, route weights and parameters, against the class's own forward; then bfloat16."""
    experts, case = build(family, name)
    for ours, eager in zip(run(experts, "moe_ops", *case), run(experts, "eager", *case), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=TOLERANCE * eager.abs().max().item())
    fused = not experts.has_post_expert_norm and gates.options(experts, experts.has_gate) is not None
    assert fused == (name not in TWO_PRODUCTS)
    # No clamp is near here: its gradient jumps, and rounded to bfloat16 a gate may fall on the other side of it.
    experts, case = build(family, name, torch.bfloat16, swiglu_limit=7.0)
    ours, eager = run(experts, "moe_ops", *case), run(experts, "eager", *case)
    x, chosen, *rest = case
    oracle = run(experts.double(), "eager", x.double(), chosen, *(value.double() for value in rest))
    for index, values in enumerate(zip(ours, eager, oracle, strict=True)):
        assert_as_accurate(*values, f"result {index}")


def test_sentinels():
    """Ids of num_experts count nothing: no result, no gradient of their tokens."""
    experts, (x, chosen, weights, gradient) = build("mixtral", "MixtralExperts")
    elsewhere = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(5)) < 0.4
    with_sentinels = run(experts, "moe_ops", x, chosen.masked_fill(elsewhere, 8), weights, gradient)
    expected = run(experts, "eager", x, chosen, weights.masked_fill(elsewhere, 0), gradient)
    for index in (0, 1, 3, 4):
        torch.testing.assert_close(with_sentinels[index], expected[index], rtol=1e-5, atol=1e-5)
    assert (with_sentinels[2][elsewhere] == 0).all()


def test_float32_weights_under_bfloat16():
    """Weights are rounded to bfloat16, their gradient is float32."""
    experts, case = build("mixtral", "MixtralExperts", torch.bfloat16)
    rounded = run(experts, "moe_ops", *case)
    results = run(experts.float(), "moe_ops", *case)
    for ours, expected in zip(results[:3], rounded[:3], strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(results[3:], rounded[3:], strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours.bfloat16(), expected)


def test_unknown_gate():
    """A gate that a class changes is measured, and served by two products where no option says it."""
    experts, case = build("mixtral", "MixtralExperts")

    class Odd(type(experts)):
        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return torch.tanh(gate) * up

    experts.__class__ = Odd
    assert gates.options(experts, True) is None
    ours = run(experts, "moe_ops", *case)
    for value, other in zip(ours, run(experts, "grouped_mm", *case), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_compiled():
    experts, (x, chosen, weights, _) = build("gpt_oss", "GptOssExperts")
    experts.config._experts_implementation = "moe_ops"
    with torch.no_grad():
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")(x, chosen, weights)
        torch.testing.assert_close(compiled, experts(x, chosen, weights), rtol=0, atol=0)


def test_enable_errors(monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"transformers 5\.23 or later is needed, got 4\.57\.1; .*\[transformers\]"):
        enable()
    monkeypatch.undo()
    with pytest.raises(TypeError, match=r"transformers\.enable: model must be a PreTrainedModel, got"):
        enable(torch.nn.Linear(2, 2))
