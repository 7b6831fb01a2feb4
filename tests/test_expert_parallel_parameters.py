"""Parameters spread over ranks: who owns what, their beginning, checkpoints on other numbers of ranks, clipping."""

import copy

import pytest
import torch
import torch.distributed as dist

import ranks
from expert_parallel_layers import INNER, assert_same, gradients_of, mesh_of, state_of
from expert_parallel_layers import build as build_any
from moe_ops import nn
from moe_ops.expert_parallel import clip_grad_norm_

OPTIONS = {"bias": True, "shared_inner": 4, "latent": 3, "router": {"correction_bias": True}}


def build(experts, mesh=None, **options):
    return build_any(experts, mesh, **{**OPTIONS, **options})


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


def give_gradients(layer, seed):
    """The same gradients as one rank would have, every rank its part of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        full = torch.randn(parameter.shape, generator=generator)
        if hasattr(parameter, "to_local"):
            from torch.distributed.tensor import distribute_tensor

            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.grad = full


def clip(layer, norm_type, max_norm):
    """torch's function on one rank, ours on more."""
    one = not any(hasattr(p, "to_local") for p in layer.parameters())
    function = torch.nn.utils.clip_grad_norm_ if one else clip_grad_norm_
    return function(layer.parameters(), max_norm, norm_type)


def clipping(counts):
    mesh = mesh_of(dist.get_world_size())
    for experts in counts:
        expected, layer = build(experts), build(experts, mesh)
        for norm_type in (2.0, 1.0, 3, float("inf")):
            for max_norm in (0.5, 1e4, float("inf")):
                for each in (expected, layer):
                    give_gradients(each, seed=7)
                norms = [clip(each, norm_type, max_norm) for each in (expected, layer)]
                torch.testing.assert_close(norms[1], norms[0], rtol=2e-6, atol=0)
                torch.testing.assert_close(gradients_of(layer), gradients_of(expected), rtol=3e-6, atol=0)
                said = [None] * mesh.size()
                dist.all_gather_object(said, norms[1].item())
                assert len(set(said)) == 1
        # What only one rank has no gradient for is still reduced on all.
        if dist.get_rank() == 0:
            layer.experts.b_in.grad = None
        clip_grad_norm_(layer.parameters(), 1.0)
        give_gradients(layer, seed=7)
        if dist.get_rank() == mesh.size() - 1 and layer.experts.w_in.to_local().numel():
            layer.experts.w_in.grad.to_local().fill_(torch.nan)
            with pytest.raises(RuntimeError, match=r"norm of order 2\.0 must be finite, got nan"):
                clip_grad_norm_(layer.parameters(), 1.0, error_if_nonfinite=True)
        else:
            clip_grad_norm_(layer.parameters(), 1.0)


def optimizer_of(layer):
    return torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)


def steps(layer, optimizer, seeds):
    for seed in seeds:
        give_gradients(layer, seed)
        optimizer.step()


def save(folder, experts):
    layer = build(experts, mesh_of(dist.get_world_size()) if dist.is_initialized() else None)
    optimizer = optimizer_of(layer)
    steps(layer, optimizer, [1, 2])
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, moments = get_state_dict(layer, optimizer)
    checkpoint.save({"model": model, "optimizer": moments}, checkpoint_id=folder)


def load(folder, experts):
    """From a checkpoint of another number of ranks, two more steps are those of one rank that never stopped."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    layer = build(experts, mesh_of(dist.get_world_size()) if dist.is_initialized() else None, seed=9)
    optimizer = optimizer_of(layer)
    model, moments = get_state_dict(layer, optimizer)
    state = {"model": model, "optimizer": moments}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(layer, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    expected = build(experts)
    steps(expected, other := optimizer_of(expected), [1, 2])
    assert_same(state_of(layer), expected.state_dict())
    steps(expected, other, [3, 4])
    steps(layer, optimizer, [3, 4])
    assert_same(state_of(layer), expected.state_dict())


def load_all(folder, worlds, counts):
    for world in worlds:
        for experts in counts:
            load(f"{folder}/{world}-{experts}", experts)


def save_all(folder, counts):
    for experts in counts:
        save(f"{folder}/{dist.get_world_size()}-{experts}", experts)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_clipping_gives_the_norm_of_one_rank(world):
    ranks.run(world, clipping, [8, 5, 3])


def resharding(folder, saved, loaded, counts):
    for world in saved:
        ranks.run(world, save_all, folder, counts)
    for world in loaded:
        ranks.run(world, load_all, folder, saved, counts)
    load_all(folder, saved, counts)  # no process group at all


def test_a_checkpoint_of_four_ranks_is_loaded_on_two_and_on_one(tmp_path):
    resharding(str(tmp_path), [4], [2, 1], [5, 3])
    ranks.run(1, save_all, str(tmp_path), [5])
    ranks.run(4, load_all, str(tmp_path), [1], [5])  # and back


@pytest.mark.long
def test_a_checkpoint_is_loaded_on_any_number_of_ranks(tmp_path):
    resharding(str(tmp_path), [1, 2, 3, 4], [1, 2, 3, 4], [8, 5, 3, 2])
