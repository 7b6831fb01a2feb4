"""The layer over several ranks against the layer on one: values and gradients, whatever the routing and the options."""

import pytest
import torch
import torch.distributed as dist

import ranks
from accuracy import assert_close
from cases import WIDEST
from expert_parallel_layers import HIDDEN, average, build, gradients_of, mesh_of, tokens
from moe_ops import losses, nn

COUNTS = [7, 0, 3, 12]  # tokens of each rank


def router(kind, **options):
    return kind(HIDDEN, **options, dtype=WIDEST)


# Experts, and options of MoE: 8 are even on 1, 2 and 4 ranks; of 5 the last of 4 ranks has none, of 3 two have one less.
LAYERS = {
    "plain": lambda: (8, {"router": {"renormalize": True}}),
    "uneven": lambda: (5, {"bias": True, "activation": "gelu"}),
    "few": lambda: (3, {"gated": False, "activation": "relu2", "bias": True}),
    "one": lambda: (1, {"top_k": 1}),
    "all_chosen": lambda: (5, {"top_k": 5}),
    "shared": lambda: (8, {"shared_inner": 9, "shared_gate": True, "latent": 4}),
    "gpt_oss": lambda: (8, {"bias": True, "layout": "interleaved", "alpha": 1.702, "limit": 0.5, "up_offset": 1.0}),
    "on_input": lambda: (5, {"weight_on": "input", "router": {"score": "sigmoid"}}),
    "capacity": lambda: (8, {"capacity_factor": 0.6}),
    "probability": lambda: (5, {"capacity_factor": 0.5, "drop_policy": "probability"}),
    "expert_choice": lambda: (5, {"router": router(nn.ExpertChoiceRouter, num_experts=5, top_k=2)}),
    "zero_computation": lambda: (
        5,
        {"zero_computation": nn.ZeroComputationExperts(HIDDEN, zero=1, skip=1, constant=2, dtype=WIDEST), "top_k": 4},
    ),
}


def make(name, mesh, **more):
    torch.manual_seed(1)
    experts, options = LAYERS[name]()
    return build(experts, mesh, **options, **more, dtype=WIDEST)


def loss(y, rank):
    """A sum over this rank's tokens, with other factors for every element."""
    return (y * tokens(len(y), rank, seed=5, dtype=y.dtype)).sum()


def compare(layer, expected, counts, scale):
    """y and gradients of this rank's layer; `expected`, on one rank, sees each rank's tokens in turn."""
    me = dist.get_rank()
    for rank in range(dist.get_world_size()):
        x = tokens(counts[rank], rank).requires_grad_()
        y = expected(x)
        loss(y, rank).backward()
        if rank == me:
            its_y, its_grad = y, x.grad
    x = tokens(counts[me], me).requires_grad_()
    y = layer(x)
    assert_close(y, its_y, rtol=1e-10, atol=1e-12)
    loss(y, me).backward()
    assert_close(x.grad, its_grad, rtol=1e-10, atol=1e-12)
    average(layer)
    gradients = gradients_of(layer)
    for name, wanted in gradients_of(expected).items():
        factor = scale if name.startswith("experts.") else 1 / dist.get_world_size()
        assert_close(gradients[name], wanted * factor, rtol=1e-10, atol=1e-11)
    return y.detach(), gradients


def layers(names):
    world = dist.get_world_size()
    mesh = mesh_of(world)
    for name in names:
        expected, layer = (make(name, each) for each in (None, mesh))
        y, gradients = compare(layer, expected, COUNTS, 1 / world)
        # Once more: the same bits.
        layer.zero_grad()
        again = layer(tokens(COUNTS[dist.get_rank()], dist.get_rank()))
        loss(again, dist.get_rank()).backward()
        average(layer)
        assert torch.equal(again, y)
        for each, grad in gradients_of(layer).items():
            assert torch.equal(grad, gradients[each]), each


@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_are_those_of_one_rank(world):
    ranks.run(world, layers, list(LAYERS))
