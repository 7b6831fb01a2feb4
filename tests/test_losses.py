"""The losses against their formulas written out in loops, and which gradients they give."""

import pytest
import torch

from accuracy import assert_close
from cases import WIDEST
from moe_ops import RouteResult, losses, route


def load_balancing_loop(experts, prob, segments, num_segments, alpha):
    """alpha · E · sum of f·P per segment, averaged over the segments that have tokens; experts [T, K], prob [T, E]."""
    num_experts = prob.shape[1]
    values = []
    for segment in range(num_segments):
        tokens = [t for t in range(len(prob)) if segments[t] == segment]
        if not tokens:
            continue
        value = 0.0
        for expert in range(num_experts):
            slots = [int(e) for t in tokens for e in experts[t]]
            share = slots.count(expert) / len(slots)
            value = value + share * sum(prob[t, expert] for t in tokens) / len(tokens)
        values.append(alpha * num_experts * value)
    return sum(values) / len(values)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("num_segments", [1, 4])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_load_balancing_matches_loop(top_k, num_segments, score, device):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, 5, generator=generator, dtype=WIDEST).to(device).requires_grad_()
    # Segment 2 of 4 stays empty: it must not weigh in the mean.
    segments = torch.tensor([0, 1, 3])[torch.randint(3, (23,), generator=generator)] % num_segments
    segments = segments.to(device)
    result = route(logits, top_k, score=score, stats=True, segments=segments, num_segments=num_segments)
    prob = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = load_balancing_loop(result.experts, prob, segments, num_segments, 0.7)
    loss = losses.load_balancing(result, alpha=0.7)
    assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_load_balancing_is_alpha_at_an_even_load(top_k):
    counts = torch.full((1, 8), 3 * top_k, dtype=torch.int32)
    mean_prob = torch.full((1, 8), 1 / 8)
    assert losses.load_balancing((counts, mean_prob), alpha=0.5).item() == 0.5


def test_load_balancing_grows_to_the_number_of_experts_at_collapse():
    counts = torch.tensor([[12, 0, 0, 0]], dtype=torch.int32)
    mean_prob = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert losses.load_balancing((counts, mean_prob)).item() == 4.0


def test_load_balancing_gradient_is_the_share_of_slots():
    counts = torch.tensor([[6, 2, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.int32)
    mean_prob = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    losses.load_balancing((counts, mean_prob), alpha=0.1).backward()
    share = torch.tensor([[0.75, 0.25, 0, 0], [0.25] * 4, [0] * 4], dtype=torch.float64)
    torch.testing.assert_close(mean_prob.grad, 0.1 * 4 * share / 2)


def test_load_balancing_is_transformers_loss_over_top_k():
    mixtral = pytest.importorskip(
        "transformers.models.mixtral.modeling_mixtral", reason="transformers is not installed"
    )
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    theirs = mixtral.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    ours = losses.load_balancing(route(logits, 2, stats=True))
    torch.testing.assert_close(ours * 2, theirs)


def test_losses_without_tokens_are_zero():
    result = RouteResult(
        torch.empty(0, 2),
        torch.empty(0, 2, dtype=torch.int32),
        torch.zeros(1, 4, dtype=torch.int32),
        torch.zeros(1, 4, requires_grad=True),
        torch.empty(0, requires_grad=True),
    )
    loss = losses.load_balancing(result) + losses.z_loss(result.logsumexp)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(result.mean_prob.grad, torch.zeros(1, 4))


def test_z_loss_is_the_mean_square_of_logsumexp():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=WIDEST, requires_grad=True)
    loss = losses.z_loss(route(logits, 2, stats=True).logsumexp, weight=0.25)
    expected = 0.25 * logits.exp().sum(-1).log().pow(2).mean()
    assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    assert_close(grad, expected_grad, rtol=1e-9, atol=1e-14)


def test_losses_repeat_bit_for_bit(device):
    logits = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()

    def run():
        result = route(logits, 4, stats=True)
        loss = losses.load_balancing(result) + losses.z_loss(result.logsumexp, weight=1e-3)
        return loss, *torch.autograd.grad(loss, logits)

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
