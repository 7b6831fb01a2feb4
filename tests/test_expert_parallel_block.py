"""The layer over several ranks against the layer on one: values and gradients, whatever the routing and the options."""

import pytest
import torch
import torch.distributed as dist

import ranks
from accuracy import assert_close
from cases import WIDEST
from expert_parallel_layers import HIDDEN, assert_same, average, build, gradients_of, mesh_of, state_of, tokens
from moe_ops import expert_parallel, losses, nn

COUNTS = [7, 0, 3, 12]  # tokens of each rank


def router(kind, **options):
    return kind(HIDDEN, **options, dtype=WIDEST)


# Experts, and options of MoE. 8 are even on 2 and 4 ranks; of 5 or 3 experts the last of 4 ranks has none.
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


def sharded_data_parallel():
    """FSDP2 over "dp" for the experts, over all ranks for the rest: one rank's model, three steps of AdamW."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = mesh_of(2, 2, names=("dp", "ep"))
    everyone = mesh["dp", "ep"]._flatten("all")
    for experts, dim in ((8, 0), (8, 1), (5, 0), (3, 0)):
        options = {"shared_inner": 4, "router": {"renormalize": True}}
        expected, layer = (build(experts, each, **options, dtype=WIDEST) for each in (None, mesh))
        fully_shard(layer.experts, mesh=mesh["dp"], shard_placement_fn=lambda _, dim=dim: Shard(dim))
        fully_shard(layer, mesh=everyone)
        assert layer.experts.w_in.to_local().numel() <= -(-experts // 4) * 10 * HIDDEN
        optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (expected, layer)]
        for step in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for rank in range(4):
                (loss(expected(tokens(COUNTS[rank], rank, seed=step)), rank) / 4).backward()
            loss(layer(tokens(COUNTS[dist.get_rank()], dist.get_rank(), seed=step)), dist.get_rank()).backward()
            norms = (
                torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.3),
                expert_parallel.clip_grad_norm_(layer.parameters(), 0.3),
            )
            assert norms[0] > 0.3
            assert_close(norms[1], norms[0], rtol=1e-10, atol=0)
            for optimizer in optimizers:
                optimizer.step()
            for name, value in state_of(layer).items():
                assert_close(value, expected.state_dict()[name], rtol=1e-9, atol=1e-10)


def test_fsdp_on_the_other_dimension():
    ranks.run(4, sharded_data_parallel)


class Model(torch.nn.Module):
    def __init__(self, mesh=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.inward = torch.nn.Linear(HIDDEN, HIDDEN, dtype=WIDEST)
        self.moe = build(5, mesh, seed=1, dtype=WIDEST, **options)
        self.outward = torch.nn.Linear(HIDDEN, HIDDEN, dtype=WIDEST)

    def forward(self, x):
        y, route = self.moe(self.inward(x), return_route=True)
        return self.outward(y), route


def data_parallel():
    """DistributedDataParallel around a model: the global batch's loss, balancing over it, and three steps."""
    world, me = dist.get_world_size(), dist.get_rank()
    count = 8
    options = {"router": {"correction_bias": True}, "shared_inner": 4}
    expected, model = Model(**options), Model(mesh_of(world), **options)
    assert expert_parallel.ignore_in_ddp(model) == ["moe.experts.w_in", "moe.experts.w_out"]
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.05) for each in (expected, model)]
    balancing = [nn.LossFreeBalancing(expected), nn.LossFreeBalancing(model, group=dist.group.WORLD)]
    for step in range(3):
        x = tokens(count * world, seed=step)
        mine = x[me * count : (me + 1) * count]
        y, route = expected(x)
        wanted = y.square().mean() + losses.load_balancing(route, alpha=0.1)
        z, its = parallel(mine)
        assert_close(z, y[me * count : (me + 1) * count], rtol=1e-9, atol=1e-11)
        # The statistics are of the rank's own tokens.
        assert torch.equal(its.experts, route.experts[me * count : (me + 1) * count])
        assert its.counts.sum() == count * 2
        ours = z.square().mean() + losses.load_balancing(its, alpha=0.1, group=dist.group.WORLD)
        for optimizer in optimizers:
            optimizer.zero_grad()
        wanted.backward()
        ours.backward()
        together = ours.detach().clone()
        dist.all_reduce(together)
        assert_close(together / world, wanted.detach(), rtol=1e-9, atol=1e-11)
        norms = (
            torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1),
            expert_parallel.clip_grad_norm_(model.parameters(), 0.1),
        )
        assert_close(norms[1], norms[0], rtol=1e-9, atol=0)
        for optimizer, each in zip(optimizers, balancing, strict=True):
            optimizer.step()
            each()
        for name, value in state_of(model).items():
            assert_close(value, expected.state_dict()[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_data_parallel_training_is_that_of_one_rank(world):
    ranks.run(world, data_parallel)


def conventions():
    """gradients="sum" leaves the experts' gradients those of the sum of the ranks' losses."""
    layer = make("uneven", mesh_of(dist.get_world_size()), gradients="sum")
    compare(layer, make("uneven", None), COUNTS, 1)


def passes():
    """Without gradients, under autocast, checkpointed, compiled, bounded, in chunks: the same layer."""
    mesh, me = mesh_of(dist.get_world_size()), dist.get_rank()
    x = tokens(COUNTS[me], me)
    layer = make("uneven", mesh)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y.detach())
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    bounded = {"mode": "bounded", "rows_per_peer": 12}
    for options in ({"chunks": 3}, bounded, {**bounded, "chunks": 2}):
        other = make("uneven", mesh, **options)
        compare(other, make("uneven", None), COUNTS, 1 / mesh.size())
        assert other.experts.dropped == 0
    compare(make("uneven", mesh, mode="bounded"), make("uneven", None), [5] * 4, 1 / mesh.size())

    # What does not fit is counted, and its tokens get nothing of the experts it was for.
    small = make("plain", mesh, mode="bounded", rows_per_peer=3)
    many = tokens(9, me)
    _, experts = small.router(many)
    asked = torch.zeros(9, mesh.size()).scatter_(1, (experts // -(-8 // mesh.size())).long(), 1).sum(0)
    small(many)
    assert small.experts.dropped == (asked - 3).clamp(min=0).sum() > 0

    # Activation checkpointing: the same bits, gradients too.
    loss(y, me).backward()
    expected = gradients_of(layer)
    layer.zero_grad()
    again = torch.utils.checkpoint.checkpoint(layer, x.clone().requires_grad_(), use_reentrant=False)
    loss(again, me).backward()
    assert torch.equal(again, y)
    assert_same(gradients_of(layer), expected)

    # Under autocast rows travel in bfloat16, and every rank rounds as one does.
    with torch.autocast("cpu", torch.bfloat16):
        layer, expected = (build(5, each, shared_inner=4) for each in (mesh, None))
        x = tokens(COUNTS[me], me, dtype=torch.float32)
        assert layer(x).dtype == expected(x).dtype
        torch.testing.assert_close(layer(x), expected(x), rtol=0.02, atol=0.02)


def compiled():
    """Bounded: one graph, for any number of tokens that all ranks have."""
    mesh, me = mesh_of(dist.get_world_size()), dist.get_rank()
    layer = build(5, mesh, mode="bounded", shared_inner=4)
    graph = torch.compile(layer, fullgraph=True, dynamic=True)
    for count in (7, 12, 3):
        x = tokens(count, me, dtype=torch.float32)
        results = []
        for each in (layer, graph):
            layer.zero_grad()
            y = each(x)
            loss(y, me).backward()
            results.append([y.detach(), *gradients_of(layer).values()])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [2, 4])
def test_sum_of_gradients(world):
    ranks.run(world, conventions)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_modes_and_passes(world):
    ranks.run(world, passes)


@pytest.mark.long
def test_a_bounded_layer_is_one_graph():
    ranks.run(2, compiled)
