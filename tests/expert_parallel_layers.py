"""What the tests of expert parallelism share: layers with and without a mesh, and their states side by side."""

import torch
import torch.distributed as dist

from cases import WIDEST
from moe_ops import nn

HIDDEN, INNER, TOP_K = 6, 5, 2


def mesh_of(*shape, names=("ep",)):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def build(experts, mesh=None, seed=0, top_k=TOP_K, **options):
    torch.manual_seed(seed)
    return nn.MoE(HIDDEN, INNER, experts, top_k, mesh=mesh, **options)


def whole(tensor):
    """All of a tensor that may be spread over ranks."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state_of(module):
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def gradients_of(module):
    return {name: whole(parameter.grad) for name, parameter in module.named_parameters()}


def assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def tokens(count, rank=0, seed=2, dtype=WIDEST):
    """[count, HIDDEN], this rank's."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)


def average(module):
    """What DistributedDataParallel does to the gradients of what every rank has whole."""
    for parameter in module.parameters():
        if not hasattr(parameter, "to_local"):
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
