"""Parameters spread over ranks: who owns what, their beginning, checkpoints on other numbers of ranks, clipping."""

import copy

import pytest
import torch
import torch.distributed as dist

import ranks
from moe_ops import nn
from moe_ops.expert_parallel import clip_grad_norm_, ignore_in_ddp

HIDDEN, INNER, TOP_K = 6, 5, 2
OPTIONS = {"bias": True, "shared_inner": 4, "latent": 3, "router": {"correction_bias": True}}


def mesh_of(*shape, names=("ep",)):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def build(experts, mesh=None, seed=0, **options):
    torch.manual_seed(seed)
    return nn.MoE(HIDDEN, INNER, experts, TOP_K, mesh=mesh, **{**OPTIONS, **options})


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state_of(module):
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def check_ownership(experts):
    """The weights of one rank, and this rank's part of them; the same again after meta, to_empty, reset."""
    mesh = mesh_of(dist.get_world_size())
    expected, layer = build(experts), build(experts, mesh)
    after = torch.rand(3)
    build(experts)
    assert torch.equal(torch.rand(3), after)  # what is built next starts the same, too
    assert_same(state_of(layer), expected.state_dict())
    parts = expected.experts.w_in.chunk(mesh.size())
    mine = parts[dist.get_rank()] if dist.get_rank() < len(parts) else expected.experts.w_in[:0]
    assert torch.equal(layer.experts.w_in.to_local(), mine)
    assert layer.experts.w_in.to_local().untyped_storage().nbytes() == 4 * mine.numel()
    late = build(experts, mesh, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    late.experts.reset_parameters()
    torch.manual_seed(3)
    expected.experts.reset_parameters()
    assert_same(state_of(late.experts), expected.experts.state_dict())
    for name in ("upcycle_", "truncated_normal_"):
        for each in (layer.experts, expected.experts):
            torch.manual_seed(4)
            if name == "upcycle_":
                nn.init.upcycle_(each, torch.rand(2 * INNER, 3), torch.rand(3, INNER), noise=0.5)
            else:
                nn.init.truncated_normal_(each.w_in)
        assert_same(state_of(layer.experts), expected.experts.state_dict())
    twin = copy.deepcopy(layer)
    assert_same(state_of(twin), state_of(layer))
    assert twin.experts.mesh == mesh


def ownership(counts):
    for experts in counts:
        check_ownership(experts)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_has_its_part_of_the_same_beginning(world):
    ranks.run(world, ownership, [8, 5, 3])
