"""torch's TF32 switch and batch invariance: who reads them, what they change and by how much."""

import pytest
import torch

import moe_ops
from accuracy import assert_bitwise_equal, place
from cases import DEVICE, Case, distinct, every_dtype, offsets_of, on_cpu, powers, randn, unaligned
from moe_ops import _C, library, numerics

pytestmark = pytest.mark.usefixtures("switches")
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="of CUDA's kernels")

COUNTS = [70, 0, 37, 1, 40]
SWITCHES = {
    "matmul.fp32_precision": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "matmul.allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "backends.fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
}


def allow(enabled):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if enabled else "ieee"


@pytest.mark.filterwarnings("ignore:Please use the new API")
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_way_to_set_the_switch_is_read(switch, monkeypatch):
    x = torch.zeros(1, 1)
    monkeypatch.setattr(library, "EMULATED", True)
    assert not numerics.allow_tf32(x)
    SWITCHES[switch]()
    assert numerics.allow_tf32(x)
    assert not numerics.allow_tf32(x.bfloat16()) and not numerics.allow_tf32(x.double())
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # after either way: reading allow_tf32 may raise now
    assert not numerics.allow_tf32(x)
    monkeypatch.setattr(library, "EMULATED", False)
    allow(True)
    assert not numerics.allow_tf32(x), "CPU tensors"


def test_set_batch_invariant():
    assert moe_ops.is_batch_invariant() is False
    moe_ops.set_batch_invariant(True)
    assert moe_ops.is_batch_invariant() is True
    with pytest.raises(TypeError, match="set_batch_invariant: enabled must be True or False, got int 1"):
        moe_ops.set_batch_invariant(1)


def to_tf32(values):
    """The nearest numbers of 10 fraction bits, ties away from zero, as the cvt.rna.tf32 of the PTX ISA."""
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def assert_tf32(ours, product, a, b, terms, what):
    """Within what rounding to TF32 and sums of so many terms in float32 allow, and no better than rounding allows.

    Rounding changes an operand by at most 2^-11 of it, so a product by 2^-10 + 2^-22; a tensor core's addition may cut
    off instead of rounding, so that each loses up to 2^-23 of the sum of magnitudes so far.
    """
    ours, magnitude = ours.cpu().double(), product(a.abs().double(), b.abs().double())
    exact, rounded = product(a.double(), b.double()), product(to_tf32(a).double(), to_tf32(b).double())
    sums = terms * 2**-23 * magnitude
    assert ((ours - rounded).abs() <= sums).all(), f"{what}: no product of operands rounded to TF32"
    assert ((ours - exact).abs() <= (2**-10 + 2**-22) * magnitude + sums).all(), f"{what}: beyond the error of TF32"
    assert (ours - rounded).square().mean() < (ours - exact).square().mean() / 64, f"{what}: not rounded to TF32"


def operands(device, n=72, k=100):
    a, w = randn(sum(COUNTS), k), randn(len(COUNTS), n, k, seed=1)
    return a, w, randn(sum(COUNTS), n, seed=2), place(offsets_of(COUNTS), device)


def products(a, w, grad, offsets, device, main_grad=False):
    """(out, grad of a, grad of w) of grouped_gemm."""
    a, w = place(a, device).detach().requires_grad_(), place(w, device).detach().requires_grad_()
    if main_grad:
        w.main_grad = torch.zeros(w.shape, device=w.device)
    out = moe_ops.grouped_gemm(a, w, offsets)
    out.backward(place(grad, device))
    return out.detach(), a.grad, w.main_grad if main_grad else w.grad


def expert_of_row():
    return torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))


@on_cuda
@pytest.mark.parametrize("layout", ["k", "n"])
def test_products_in_tf32(layout, device):
    """out and both gradients, weights with their unit stride along K and along N."""
    a, w, grad, offsets = operands(device)
    if layout == "n":
        w = w.transpose(1, 2).contiguous().transpose(1, 2)
    plain = products(a, w, grad, offsets, device)
    allow(True)
    ours = products(a, w, grad, offsets, device)
    experts, belongs = expert_of_row(), torch.nn.functional.one_hot(expert_of_row()).double()
    formulas = [
        (lambda a, w: torch.einsum("rk,rnk->rn", a, w[experts]), a, w, a.shape[1], "out"),
        (lambda g, w: torch.einsum("rn,rnk->rk", g, w[experts]), grad, w, w.shape[1], "grad a"),
        (lambda g, a: torch.einsum("re,rn,rk->enk", belongs, g, a), grad, a, max(COUNTS), "grad w"),
    ]
    for value, exact, formula in zip(ours, plain, formulas, strict=True):
        assert_tf32(value, *formula)
        product, x, y, terms, what = formula
        magnitude = product(x.abs().double(), y.abs().double())
        error = (exact.cpu().double() - product(x.double(), y.double())).abs()
        assert (error <= terms * 2**-24 * magnitude).all(), f"{what} without the switch"
    assert_bitwise_equal(products(a, w, grad, offsets, device, main_grad=True)[2], ours[2], "main_grad")


@on_cuda
def test_only_the_weight_gradient_of_unaligned_rows_is_in_tf32(device):
    a, w, grad, offsets = operands(device, n=71, k=99)
    plain = products(a, w, grad, offsets, device)
    allow(True)
    ours = products(a, w, grad, offsets, device)
    assert_bitwise_equal(ours[0], plain[0], "out")
    assert_bitwise_equal(ours[1], plain[1], "grad a")
    belongs = torch.nn.functional.one_hot(expert_of_row()).double()
    assert_tf32(ours[2], lambda g, a: torch.einsum("re,rn,rk->enk", belongs, g, a), grad, a, max(COUNTS), "grad w")


@on_cuda
def test_few_rows_stay_float32_unless_batch_invariance_puts_them_in_tiles(device):
    a, w, _, offsets = operands(device)
    a, few = place(a, device), place(torch.tensor([0, 64, 64, 64, 64, 64], dtype=torch.int32), device)
    w = place(w, device)
    exact = moe_ops.grouped_gemm(a[:64], w, few)
    allow(True)
    assert_bitwise_equal(moe_ops.grouped_gemm(a[:64], w, few), exact, "few rows")
    many = moe_ops.grouped_gemm(a, w, offsets)
    moe_ops.set_batch_invariant(True)
    assert_bitwise_equal(moe_ops.grouped_gemm(a[:64], w, few), many[:64], "few rows in tiles")
    assert not torch.equal(many[:64], exact)


LAYER = Case("", tokens=80, experts=5, top_k=2, hidden=64, inner=48, choose=distinct)


def layer_tensors(seed=0):
    return {
        "x": randn(LAYER.tokens, LAYER.hidden, seed=seed),
        "weights": powers(LAYER.tokens, LAYER.top_k),
        "w_in": randn(LAYER.experts, LAYER.inner, LAYER.hidden, seed=2, scale=0.1),
        "w_out": randn(LAYER.experts, LAYER.hidden, LAYER.inner, seed=3, scale=0.1),
    }


def by_verbs(x, weights, plan, w_in, w_out):
    inner = moe_ops.grouped_gemm(x, w_in, plan.offsets, gather=plan).relu()
    return moe_ops.combine(moe_ops.grouped_gemm(inner, w_out, plan.offsets), weights, plan)


def fused(x, weights, plan, w_in, w_out):
    return moe_ops.moe_mlp(x, weights, None, w_in, w_out, activation="relu", gated=False, plan=plan)


def run(call, device, between=lambda: None):
    """y and the gradients of x and both weights."""
    tensors = {n: place(t, device).requires_grad_() for n, t in layer_tensors().items()}
    plan = moe_ops.plan(place(LAYER.ids(), device), LAYER.experts)
    y = call(tensors["x"], tensors["weights"], plan, tensors["w_in"], tensors["w_out"])
    between()
    gradient = place(randn(LAYER.tokens, LAYER.hidden, seed=9), device)
    return y.detach(), *torch.autograd.grad(y, [tensors[n] for n in ("x", "w_in", "w_out")], gradient)


NAMES = ("y", "grad x", "grad w_in", "grad w_out")


@on_cuda
def test_moe_mlp_rounds_what_its_verbs_round(device):
    """The route weights are powers of two, so that it does not matter when they multiply."""
    plain = run(fused, device)
    allow(True)
    for name, ours, verbs, exact in zip(NAMES, run(fused, device), run(by_verbs, device), plain, strict=True):
        assert_bitwise_equal(ours, verbs, name)
        assert not torch.equal(ours, exact), f"{name} is the same without TF32"


@on_cuda
@pytest.mark.parametrize("call", [fused, by_verbs])
@pytest.mark.parametrize("enabled", [False, True])
def test_backward_does_what_forward_did(call, enabled, device):
    allow(enabled)
    expected = run(call, device)
    ours = run(call, device, between=lambda: allow(not enabled))
    for name, mine, other in zip(NAMES, ours, expected, strict=True):
        assert_bitwise_equal(mine, other, name)


@on_cpu
def test_the_cpu_has_no_tf32():
    a, w, grad, offsets = operands(torch.device("cpu"))
    operator, weight_grad = torch.ops.moe_ops.grouped_gemm, torch.ops.moe_ops.grouped_gemm_weight_grad
    expected = operator(a, w, offsets, None, None, None, None, False, False)
    assert_bitwise_equal(operator(a, w, offsets, None, None, None, None, True, False), expected)
    expected = weight_grad(grad, a, offsets, None, 1, torch.float32, False)
    assert_bitwise_equal(weight_grad(grad, a, offsets, None, 1, torch.float32, True), expected)


@on_cuda
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bfloat16"])
def test_one_token_of_many(precision, device):
    """Alone and among 511 others: the same bits in y and in the gradients of x and of the route weights."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    allow(precision == "tf32")
    case = Case("", tokens=512, experts=5, top_k=2, hidden=48, inner=40, choose=distinct)
    x, weights, ids = randn(512, 48, dtype=dtype), torch.rand(512, 2), case.ids()
    w_in = place(randn(5, 80, 48, dtype=dtype, seed=2), device)
    w_out = place(randn(5, 48, 40, dtype=dtype, seed=3), device)
    gradient = randn(512, 48, dtype=dtype, seed=4)

    def results(tokens):
        leaves = [place(t[tokens].clone(), device).requires_grad_() for t in (x, weights)]
        y = moe_ops.moe_mlp(*leaves, place(ids[tokens], device), w_in, w_out)
        return y.detach(), *torch.autograd.grad(y, leaves, place(gradient[tokens], device))

    if DEVICE == "simt":  # of 4 processors
        sizes = [_C.gemm_tiles(4, "bfloat16", rows, 5, 48)["rows"] for rows in (2, 1024)]
        assert sizes == [64, 128], "tiles of either size are meant to be compared"
    moe_ops.set_batch_invariant(True)
    together = results(torch.arange(512))
    for token in (0, 300, 511):
        for name, alone, among in zip(("y", "grad x", "grad weights"), results([token]), together, strict=True):
            assert_bitwise_equal(alone, among[[token]], f"{name} of token {token}")
    if dtype == torch.bfloat16:
        return  # whose last rounding hides the order of so short sums
    moe_ops.set_batch_invariant(False)
    streamed = torch.cat([results([token])[0] for token in range(0, 64, 8)])
    assert not torch.equal(streamed, together[0][0:64:8]), "the switch changes nothing: a kernel of its own is expected"


@every_dtype
@pytest.mark.parametrize("rows", [5, 100])
def test_alignment_changes_no_bit(rows, dtype, device):
    """Operands that are copied as they lie, and those that pass through registers."""
    a, w = place(randn(rows, 64, dtype=dtype), device), place(randn(1, 32, 64, dtype=dtype, seed=1), device)
    offsets = place(torch.tensor([0, rows], dtype=torch.int32), device)
    expected = moe_ops.grouped_gemm(a, w, offsets)
    assert_bitwise_equal(moe_ops.grouped_gemm(unaligned(a), w, offsets), expected, "rows")
    assert_bitwise_equal(moe_ops.grouped_gemm(a, unaligned(w), offsets), expected, "weights")


def test_compiled_code_reads_both_switches_and_traces_again(device, monkeypatch):
    monkeypatch.setattr(library, "EMULATED", True)
    seen = []

    def spy(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is torch.ops.moe_ops.moe_mlp:
                seen.append(node.args[-5:-3])
            if node.target is torch.ops.moe_ops.grouped_gemm:
                seen.append(node.args[-2:])
        return graph.forward

    tensors = {n: place(t, device) for n, t in layer_tensors().items()}
    plan = moe_ops.plan(place(LAYER.ids(), device), LAYER.experts)

    def both(x, weights, w_in, w_out):
        return fused(x, weights, plan, w_in, w_out), moe_ops.grouped_gemm(x, w_in, plan.offsets, gather=plan)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=spy)
    for flags in ((False, False), (True, False), (True, True), (False, True)):
        allow(flags[0])
        moe_ops.set_batch_invariant(flags[1])
        for ours, eager in zip(compiled(**tensors), both(**tensors), strict=True):
            assert_bitwise_equal(ours, eager)
        assert seen == [flags, flags]
        compiled(**tensors)
        assert len(seen) == 2, "traced again without need"
        seen.clear()
