"""The public functions under compile, export and autocast; and what is refused with a clear text."""

import pytest
import torch
from torch._dynamo.utils import counters

import moe_ops
from cases import WIDEST
from moe_ops.library import OPERATORS
from samples import INNER, SAMPLES, E, H, K, Maker, T

SIZES = (5, 17, 0, 1, 33, 2, 64)


class Layer(torch.nn.Module):
    """Every public function in one layer: the fused path plus the path by single verbs."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"router": (E, H), "scale": (E,), "w_in": (E, 2 * INNER, H), "b_in": (E, 2 * INNER)}
        shapes["w_out"] = (E, H, INNER)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        routed = moe_ops.route(
            x @ self.router.t(), K, score="sigmoid", renormalize=True, expert_scale=self.scale, softcap=30.0, stats=True
        )
        weights, experts = routed.weights, routed.experts
        y = moe_ops.moe_mlp(x, weights, experts, self.w_in, self.w_out, b_in=self.b_in, limit=7.0, capacity=6)
        rows, plan = moe_ops.dispatch(x, experts, E, capacity=6, drop_policy="probability", weights=weights)
        gate = moe_ops.grouped_gemm(x, self.w_in, plan.offsets, bias=self.b_in, gather=plan)[:, :INNER].tanh()
        by_verbs = moe_ops.combine(rows + moe_ops.grouped_gemm(gate, self.w_out, plan.offsets), weights, plan)
        plain = moe_ops.moe_mlp(
            x, weights, None, self.w_in, self.w_out, gated=True, layout="interleaved", weight_on="input", plan=plan
        )
        return y + by_verbs + plain, routed.mean_prob.square().sum() + routed.logsumexp.square().sum()


def tokens(count: int, device: torch.device) -> torch.Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(count)).to(device)


def gradients(call, layer: Layer, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y, loss = call(x)
    return [y, loss, *torch.autograd.grad((y * y.detach()).sum() + loss, [x, *layer.parameters()])]


@pytest.mark.parametrize(("backend", "sizes"), [("aot_eager", SIZES), ("inductor", (5, 17))])
def test_compiled_layer_with_any_number_of_tokens(backend, sizes, device):
    """A graph break would fail; one graph for each of 0, 1 and any other size is what torch specialises."""
    layer = Layer(device)
    torch._dynamo.reset()
    counters["stats"].clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for count in sizes:
        x = tokens(count, device)
        for ours, eager in zip(gradients(compiled, layer, x), gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == len({min(count, 2) for count in sizes})


def test_compiled_without_gradients_keeps_no_pre_activation(device):
    layer, seen = Layer(device), []

    def spy(graph, inputs):
        seen.extend(node.args[-3] for node in graph.graph.nodes if node.target is torch.ops.moe_ops.moe_mlp)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=spy)
    x = tokens(5, device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
    assert seen == [False, False]
    compiled(x)
    assert seen == [False, False, True, True]


def test_compiled_code_makes_the_same_complaints(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: moe_ops.route(x, E + 1), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=rf"route: top_k must be between 1 and num_experts \({E}\), got {E + 1}"):
        compiled(torch.zeros(T, E, device=device))


@pytest.mark.parametrize("strict", (False, True))
def test_exported_layer_with_any_number_of_tokens(strict, device):
    layer = Layer(device)
    dynamic = ({0: torch.export.Dim("tokens", min=2)},)
    program = torch.export.export(layer, (tokens(5, device),), dynamic_shapes=dynamic, strict=strict)
    called = {str(node.target) for node in program.graph.nodes if "moe_ops" in str(node.target)}
    assert called == {
        f"moe_ops.{name}.default" for name in ("route", "plan", "permute", "grouped_gemm", "combine", "moe_mlp")
    }
    for count in (2, 5, 33):
        x = tokens(count, device)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_exported_layer_survives_a_file(device, tmp_path):
    layer = Layer(device)
    dynamic = ({0: torch.export.Dim("tokens", min=2)},)
    torch.export.save(torch.export.export(layer, (tokens(5, device),), dynamic_shapes=dynamic), tmp_path / "layer.pt2")
    loaded, x = torch.export.load(tmp_path / "layer.pt2").module(), tokens(7, device)
    torch.testing.assert_close(loaded(x), layer(x))


def test_data_dependent_number_of_tokens(device):
    """A size that only the data knows: nothing in wrappers and fakes branches on it."""

    def chosen_tokens(x, w_in, w_out, logits, keep):
        x, logits = x[keep.nonzero().squeeze(1)], logits[keep.nonzero().squeeze(1)]
        weights, experts = moe_ops.route(logits, K)
        return moe_ops.moe_mlp(x, weights, experts, w_in, w_out)

    make = Maker(device, torch.float32)
    keep = torch.tensor([True, False, True, True, False], device=device)
    args = (make(T, H), make(E, 2 * INNER, H), make(E, H, INNER), make(T, E), keep)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen_tokens, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), chosen_tokens(*args))


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.float16), ids=str)
def test_autocast_of_moe_mlp(weight_dtype, device):
    """x goes to the autocast dtype; float32 weights are rounded by the operator and keep a float32 gradient."""
    make = Maker(device, torch.float32)
    x, weights, experts = make(T, H, grad=True), make(T, K), make.experts()
    w_in = make(E, 2 * INNER, H, dtype=weight_dtype, grad=True)
    w_out = make(E, H, INNER, dtype=weight_dtype, grad=True)
    b_in = make(E, 2 * INNER, dtype=weight_dtype)
    with torch.autocast(device.type, torch.bfloat16):
        y = moe_ops.moe_mlp(x, weights, experts, w_in, w_out, b_in=b_in)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert w_in.grad.dtype == w_out.grad.dtype == weight_dtype
    expected = moe_ops.moe_mlp(
        x.bfloat16(), weights, experts, w_in.bfloat16(), w_out.bfloat16(),
        b_in=b_in if weight_dtype == torch.float32 else b_in.bfloat16(),
    )  # fmt: skip
    assert torch.equal(y, expected)


def test_autocast_of_grouped_gemm(device):
    make = Maker(device, torch.float32)
    plan, x, w = make.plan(), make(T, H), make(E, INNER, H)
    with torch.autocast(device.type, torch.bfloat16):
        out = moe_ops.grouped_gemm(x, w, plan.offsets, gather=plan)
    assert torch.equal(out, moe_ops.grouped_gemm(x.bfloat16(), w.bfloat16(), plan.offsets, gather=plan))


@pytest.mark.float64
def test_autocast_leaves_float64(device):
    make = Maker(device, torch.float64)
    with torch.autocast(device.type, torch.bfloat16):
        assert moe_ops.grouped_gemm(make(T * K, H), make(E, INNER, H), make.plan().offsets).dtype == torch.float64


def test_autocast_leaves_route_in_float32(device):
    logits = Maker(device, torch.float32)(T, E)
    with torch.autocast(device.type, torch.bfloat16):
        weights, experts = moe_ops.route(logits, K)
        assert moe_ops.route(logits.bfloat16(), K)[0].dtype == torch.float32
    expected = moe_ops.route(logits, K)
    assert torch.equal(weights, expected[0]) and torch.equal(experts, expected[1])


def test_autocast_inside_compile(device):
    layer, x = Layer(device), tokens(5, device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, torch.bfloat16):
        for ours, eager in zip(compiled(x), layer(x), strict=True):
            assert ours.dtype == eager.dtype
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_is_refused(name, device):
    args = SAMPLES[name](Maker(device, torch.float32))[0]
    batched = args[0].expand(2, *args[0].shape)
    operator = getattr(torch.ops.moe_ops, name)
    with pytest.raises(RuntimeError, match=f"moe_ops::{name} does not support torch.vmap"):
        torch.vmap(lambda first: operator(first, *args[1:]))(batched)


@pytest.mark.parametrize("name", ("route", "grouped_gemm", "combine", "moe_mlp"))
def test_double_backward_is_refused(name, device):
    """At the second backward, not at the first: a gradient made with create_graph=True can be used."""
    make = Maker(device, WIDEST, grad=True)
    args = SAMPLES[name](make)[1 if name == "combine" else 0]
    wanted = args[1] if name in ("grouped_gemm", "combine") else args[0]
    out = getattr(torch.ops.moe_ops, name)(*args)
    first = out[0] if isinstance(out, tuple) else out
    (gradient,) = torch.autograd.grad(first.square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name} cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("transform", (torch.func.grad, torch.func.jacrev))
def test_func_transforms_are_refused_by_torch(transform, device):
    """torch does not offer them to gradients registered in Python; the day it does, the docstring of ops.py changes."""
    make = Maker(device, WIDEST)
    plan = make.plan()
    with pytest.raises(RuntimeError, match="setup_context"):
        transform(lambda x: moe_ops.permute(x, plan).sum())(make(T, H))
