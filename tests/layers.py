"""What the tests of nn share: sizes, tokens, one expert by hand, a sum over all experts, gradients side by side."""

import torch
from torch.nn import functional as F

from accuracy import assert_close
from cases import WIDEST

HIDDEN, INNER, EXPERTS, TOP_K = 12, 7, 5, 2
RTOL, ATOL = 1e-9, 1e-11  # in float64


def tokens(*shape, dtype=WIDEST, seed=2):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def feed_forward(x, experts, expert):
    """One expert on one token [hidden], by the formulas of the papers."""
    h = experts.w_in[expert] @ x
    if experts.b_in is not None:
        h = h + experts.b_in[expert]
    if experts.gated:
        gate, up = (h[::2], h[1::2]) if experts.layout == "interleaved" else h.chunk(2)
        if experts.limit is not None:
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        inner = gate * torch.sigmoid(experts.alpha * gate) * (up + experts.up_offset)
    else:
        inner = F.relu(h) ** 2
    y = experts.w_out[expert] @ inner
    return y if experts.b_out is None else y + experts.b_out[expert]


def build(kind, *args, seed=0, **options):
    torch.manual_seed(seed)
    return kind(HIDDEN, *args, dtype=WIDEST, **options)


def assert_same_gradients(ours, expected, wanted, seed=5):
    """The gradients of two tensors of one shape, under the same outgoing one."""
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grad = grad.to(ours.dtype).to(ours.device)
    pairs = zip(
        torch.autograd.grad(ours, wanted, grad, retain_graph=True),
        torch.autograd.grad(expected, wanted, grad, retain_graph=True),
        strict=True,
    )
    for mine, theirs in pairs:
        assert theirs.abs().max() > 0
        assert_close(mine, theirs, rtol=RTOL, atol=ATOL)


def dense_moe(layer, x, gates):
    """sum over e of gates[t, e] · expert e of x[t], for gates [tokens, experts] made elsewhere."""
    rows = [
        sum(gates[t, e] * feed_forward(x[t], layer.experts, e) for e in range(gates.shape[1])) for t in range(len(x))
    ]
    return torch.stack(rows)
