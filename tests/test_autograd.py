"""autograd.call: what it records is what the operator would have recorded, and who watches operators sees them."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

import moe_ops
from cases import WIDEST
from moe_ops.autograd import FORMULAS, call
from samples import INNER, SAMPLES, E, H, K, Maker, T


def outputs_and_gradients(function, args):
    args = [arg.detach().clone().requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg for arg in args]
    outputs = function(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    recorded = [out for out in outputs if out.requires_grad]
    wanted = [arg for arg in args if torch.is_tensor(arg) and arg.requires_grad]
    gradients = torch.autograd.grad(recorded, wanted, [torch.ones_like(out) for out in recorded], allow_unused=True)
    return outputs, gradients


@pytest.mark.parametrize("name", FORMULAS)
def test_call_is_the_operator(name, device):
    operator = getattr(torch.ops.moe_ops, name)
    for args in SAMPLES[name](Maker(device, torch.float32, grad=True)):
        outputs, gradients = outputs_and_gradients(lambda *given: call(operator, *given), args)
        expected, expected_gradients = outputs_and_gradients(operator, args)
        for ours, theirs in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        assert [out.requires_grad for out in outputs] == [out.requires_grad for out in expected]
        assert {out.grad_fn.name() for out in outputs if out.requires_grad} == {f"{name}Backward"}


def layer(x, weights, experts, w_in, w_out):
    return moe_ops.moe_mlp(x, weights, experts, w_in, w_out)


@pytest.fixture
def operands(device):
    make = Maker(device, WIDEST, grad=True)
    return make(T, H), make(T, K), make.experts(), make(E, 2 * INNER, H), make(E, H, INNER)


def test_double_backward_of_moe_mlp_is_refused(operands):
    (gradient,) = torch.autograd.grad(layer(*operands).square().sum(), operands[0], create_graph=True)
    with pytest.raises(RuntimeError, match="moe_mlp cannot be differentiated twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(reentrant, operands):
    expected = torch.autograd.grad(layer(*operands).square().sum(), operands[0])
    again = torch.utils.checkpoint.checkpoint(layer, *operands, use_reentrant=reentrant)
    again.square().sum().backward()
    assert torch.equal(operands[0].grad, *expected)


class Scale(TorchFunctionMode):
    """Multiplies what any function of torch returns by a factor that requires grad."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * self.factor if func is torch.ops.moe_ops.permute else result


def test_torch_function_overrides_the_operator(device):
    make = Maker(device, WIDEST)
    plan, x, factor = make.plan(), make(T, H), make(1, grad=True)
    with Scale(factor):
        rows = moe_ops.permute(x, plan)
    (gradient,) = torch.autograd.grad(rows.sum(), factor)
    torch.testing.assert_close(gradient, moe_ops.permute(x, plan).sum()[None])


def test_vmap_over_a_public_function_is_refused(device):
    make = Maker(device, torch.float32)
    rows, w, plan = make(2, T * K, H), make(E, INNER, H, grad=True), make.plan()
    with pytest.raises(RuntimeError, match=r"moe_ops::grouped_gemm does not support torch\.vmap"):
        torch.vmap(lambda a: moe_ops.grouped_gemm(a, w, plan.offsets))(rows)


def test_make_fx_traces_forward_and_backward(operands):
    def step(x, *rest):
        return torch.autograd.grad(layer(x, *rest).sum(), x)

    graph = make_fx(step)(*operands)
    called = [str(node.target) for node in graph.graph.nodes if "moe_ops" in str(node.target)]
    assert called == ["moe_ops.plan.default", "moe_ops.moe_mlp.default", "moe_ops.moe_mlp_backward.default"]
    assert torch.equal(*graph(*operands), *step(*operands))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_torchscript_traces_the_operator(operands):
    x, *rest = (tensor.detach() for tensor in operands)
    traced = torch.jit.trace(layer, (x.requires_grad_(), *rest), check_trace=False)
    assert "moe_ops::moe_mlp" in {node.kind() for node in traced.graph.nodes()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gather", (False, True))
def test_gradients_lie_as_their_weights(gather, dtype, device, switches):
    """A transposed parameter takes its gradient without a copy, and it has the bits of a plain one's."""
    moe_ops.set_batch_invariant(True)  # forward's sums are in one order then
    make = Maker(device, dtype, grad=True)
    plan, ids, x, weights, a = make.plan(), make.experts(), make(T, H), make(T, K), make(T if gather else T * K, H)
    values = [make(*shape, grad=False) for shape in ((E, 2 * INNER, H), (E, H, INNER), (E, INNER, H))]
    grads = []
    for transposed in (False, True):
        w_in, w_out, w = ((v.mT.contiguous().mT if transposed else v.clone()).requires_grad_() for v in values)
        y = moe_ops.moe_mlp(x, weights, ids, w_in, w_out, weight_on="input" if gather else "output")
        rows = moe_ops.grouped_gemm(a, w, plan.offsets, gather=plan if gather else None)
        given = torch.autograd.grad([y.sum(), rows.square().sum()], [w_in, w_out, w])
        for grad, weight in zip(given, (w_in, w_out, w), strict=True):
            assert grad.stride() == weight.stride()
        grads.append(given)
    for plain, transposed in zip(*grads, strict=True):
        assert torch.equal(plain, transposed)


def test_a_gradient_beside_gaps_is_contiguous(device):
    """As that of a part of a parameter is: torch puts it into its place."""
    make = Maker(device, torch.float32)
    plan, a, parameter = make.plan(), make(T * K, H), make(E, H, 2 * INNER)
    half = parameter[:, :, :INNER].mT.requires_grad_()
    (grad,) = torch.autograd.grad(moe_ops.grouped_gemm(a, half, plan.offsets).sum(), half)
    assert grad.is_contiguous()
