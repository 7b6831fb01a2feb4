"""More than 2**31 elements: an offset held in 32 bits would wrap."""

import pytest
import torch

import moe_ops
from accuracy import place

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
