"""More than 2**31 elements: an offset held in 32 bits would wrap.

Tensors whose entries lie far apart need address space alone on a host, where pages that nobody touches take no memory.
What fills such a tensor is marked long. A GPU has no such pages: there all of this is long.
"""

import pytest
import torch

import moe_ops
from accuracy import assert_bitwise_equal, compare, place
from calls import GEMM, MLP, combine, exact_tensors, moe_mlp, permute, product
from cases import Case, integers

STEP = 2**31 + 64  # elements

pytestmark = pytest.mark.long_on_card


# ---- far apart in memory --------------------------------------------------------------------------------------------


def far(t, dim=0):
    """The same values, STEP elements between one entry of a dimension and the next."""
    strides = list(torch.empty(t.shape[dim:], device="meta").stride())
    strides[0] = STEP
    for size in reversed(t.shape[1 : dim + 1]):
        strides.insert(0, strides[0] * size)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    return torch.empty(span, dtype=t.dtype, device=t.device).as_strided(t.shape, strides).copy_(t)


def columns_apart(t):
    """The same matrices, their columns STEP elements apart and their rows of unit stride."""
    return far(t.transpose(-1, -2).contiguous(), t.dim() - 2).transpose(-1, -2)


def check(call, tensors, device, needs, **moved):
    """Values and gradients are those of the tensors as they lie, bit for bit; the outgoing gradient is far, too."""
    near = compare(call, tensors, device, needs, exact=True)
    ours = compare(call, tensors | moved, device, needs, exact=True, grad_layout=far)
    for name in near:
        assert_bitwise_equal(ours[name], near[name], name)


# Two tokens that choose the experts in the opposite order, so that no row is where its token was.
SWAPPED = torch.tensor([[1], [0]], dtype=torch.int32)
LOW = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_far_tokens_of_permute(dtype, device):
    x = integers(2, 9, dtype=dtype)
    check(permute(SWAPPED, 2), {"x": x}, device, ("x",), x=far(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_far_rows_of_combine(dtype, device, instruction_set):
    tensors = {"rows": integers(2, 37, dtype=dtype), "weights": torch.tensor([[0.5], [2.0]])}
    check(combine(SWAPPED, 2), tensors, device, ("rows", "weights"), rows=far(tensors["rows"]))
    tensors = {"rows": tensors["rows"]}
    check(combine(torch.tensor([[1, 0]]), 2), tensors, device, ("rows",), rows=far(tensors["rows"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_far_logits_of_route(dtype, device, instruction_set):
    logits = integers(2, 37, dtype=dtype, limit=40)
    near, ours = logits.clone().requires_grad_(), far(logits).requires_grad_()
    results = [moe_ops.route(place(leaf, device), 3, renormalize=True, stats=True) for leaf in (near, ours)]
    for expected, mine in zip(*results, strict=True):
        assert_bitwise_equal(mine, expected)
    for leaf, result in zip((near, ours), results, strict=True):
        (result.weights.square().sum() + result.mean_prob.square().sum() + result.logsumexp.sum()).backward()
        assert leaf.grad.count_nonzero() > 0
    assert_bitwise_equal(ours.grad, near.grad)


GEMM_TENSORS = {
    "a": integers(2, 40, dtype=LOW, limit=1),
    "w": integers(2, 35, 40, dtype=LOW, seed=1, limit=1),
    "bias": integers(2, 35, dtype=LOW, seed=2),
}


@pytest.mark.parametrize("name", GEMM)
def test_far_operands_of_grouped_gemm(name, device, instruction_set):
    """Rows, experts' weights, experts' biases."""
    call = product(torch.tensor([0, 1, 2], dtype=torch.int32))
    check(call, GEMM_TENSORS, device, GEMM, **{name: far(GEMM_TENSORS[name])})


@pytest.mark.parametrize("layout", [lambda w: far(w, 1), columns_apart], ids=["rows", "columns"])
def test_far_rows_and_columns_of_one_weight(layout, device, instruction_set):
    """[n, k] of unit stride along k, and, as a transposed view has it, along n."""
    tensors = {"a": integers(2, 2, dtype=LOW, limit=1), "w": integers(1, 2, 2, dtype=LOW, seed=1, limit=1)}
    call = product(torch.tensor([0, 2], dtype=torch.int32))
    check(call, tensors, device, ("a", "w"), w=layout(tensors["w"]))


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("name", MLP)
def test_far_operands_of_moe_mlp(name, weight_on, device, instruction_set):
    case = Case("", tokens=2, experts=2, top_k=1, hidden=9, inner=5)
    tensors = exact_tensors(case)
    call = moe_mlp(SWAPPED, activation="relu", weight_on=weight_on)
    check(call, tensors, device, MLP, **{name: far(tensors[name])})


# ---- large in memory ------------------------------------------------------------------------------------------------

HIDDEN = 2048
TOKENS = 2**20 + 3  # [T, H] in bfloat16: 4 GiB, and 2**31 elements are passed at token 2**20


def numbered_tokens(tokens):
    """Rows that can be told apart: token t holds t in two digits, in its first and last columns."""
    x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    for column in (0, HIDDEN - 2):
        x[:, column] = (torch.arange(tokens) % 256).bfloat16()
        x[:, column + 1] = (torch.arange(tokens) // 256 % 256).bfloat16()
    x[:, 5] = (torch.arange(tokens) // 65536).bfloat16()
    return x


@pytest.mark.long
def test_permute_and_combine_past_2_31_elements(device):
    """12 GiB at most: x, its rows, and the sum that brings them back."""
    x = place(numbered_tokens(TOKENS), device)
    ids = torch.arange(TOKENS, dtype=torch.int32)[:, None].flip(0) % 5  # rows lie in another order than tokens
    rows, plan = moe_ops.dispatch(x, place(ids, device), 5)
    assert rows.numel() > 2**31
    token = plan.row_token.long()
    for column in (0, 1, 5, HIDDEN - 2, HIDDEN - 1):
        assert torch.equal(rows[:, column], x[token, column])
    y = moe_ops.combine(rows, None, plan)
    del rows
    assert torch.equal(y, x)


@pytest.mark.long
def test_the_gradient_of_permute_past_2_31_elements(device):
    x = place(numbered_tokens(TOKENS), device)
    plan = moe_ops.plan(place(torch.zeros(TOKENS, 1, dtype=torch.int32), device), 1)
    leaf = torch.zeros(1, dtype=torch.bfloat16, device=x.device).expand(TOKENS, HIDDEN).requires_grad_()
    rows = moe_ops.permute(leaf, plan)
    (grad,) = torch.autograd.grad(rows, leaf, x)
    assert torch.equal(grad, x)


@pytest.mark.long
def test_grouped_gemm_past_2_31_elements(device):
    """The rows of the last expert lie behind element 2**31 of a, and of nothing else."""
    rows, tail = 2**20 + 64, 64
    a = torch.zeros(rows, HIDDEN, dtype=torch.bfloat16)
    a[-tail:] = torch.randint(-1, 2, (tail, HIDDEN)).bfloat16()
    w = torch.randint(-1, 2, (2, 8, HIDDEN)).bfloat16()
    offsets = torch.tensor([0, rows - tail, rows], dtype=torch.int32)
    a, w = place(a, device), place(w, device).requires_grad_()
    out = moe_ops.grouped_gemm(a, w, place(offsets, device))
    assert out[:-tail].count_nonzero() == 0
    assert torch.equal(out[-tail:], (a[-tail:].float() @ w[1].float().t()).to(out.dtype))
    (grad,) = torch.autograd.grad(out, w, torch.ones_like(out))
    assert grad[0].count_nonzero() == 0
    assert torch.equal(grad[1], a[-tail:].float().sum(0).expand(8, -1).to(grad.dtype))


@pytest.mark.long
def test_a_weight_past_2_31_elements(device):
    """The last expert's weights lie behind element 2**31."""
    experts, n, k = 1025, 1024, 2048
    w = torch.zeros(experts, n, k, dtype=torch.bfloat16)
    w[-1, :, :4] = torch.randint(-2, 3, (n, 4)).bfloat16()
    a = torch.ones(3, k, dtype=torch.bfloat16)
    offsets = torch.zeros(experts + 1, dtype=torch.int32)
    offsets[-1] = 3
    out = moe_ops.grouped_gemm(place(a, device), place(w, device), place(offsets, device))
    assert torch.equal(out.cpu(), w[-1, :, :4].float().sum(1).bfloat16().expand(3, n))
