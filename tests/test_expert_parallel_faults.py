"""Ranks that disagree, die or hang: every other rank gets an exception that says what happened, within the timeout."""

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import ranks
from expert_parallel_layers import average, build, mesh_of, tokens
from moe_ops.expert_parallel import clip_grad_norm_

TIMEOUT = 3.0  # seconds, of the process group in tests of what hangs

# What rank 1 says instead, and what every rank is told.
DISAGREEMENTS = {
    "num_experts": ((9, {}), "num_experts 8 on ranks 0, 2, 3 and 9 on rank 1"),
    "chunks": ((8, {"chunks": 2}), "chunks 1 on ranks 0, 2, 3 and 2 on rank 1"),
    "mode": ((8, {"mode": "bounded"}), "mode 'exact' on ranks 0, 2, 3 and 'bounded' on rank 1"),
    "dtype": ((8, {"dtype": torch.bfloat16}), "dtype torch.float32 on ranks 0, 2, 3 and torch.bfloat16 on rank 1"),
    "activation": ((8, {"activation": "gelu"}), "activation 'silu' on ranks 0, 2, 3 and 'gelu' on rank 1"),
    "seed": ((8, {"seed": 7}), "torch's generator (its state, from torch.manual_seed) "),
    "top_k": ((8, {"top_k": 3}), "top_k 2 on ranks 0, 2, 3 and 3 on rank 1"),
    "two": (
        (8, {"bias": True, "gradients": "sum"}),
        "and 'sum' on rank 1; bias False on ranks 0, 2, 3",
    ),
}


def disagree():
    mesh, said = mesh_of(dist.get_world_size()), {}
    for name, ((experts, options), _) in DISAGREEMENTS.items():
        try:
            build(experts, mesh, **options) if dist.get_rank() == 1 else build(8, mesh)
        except ValueError as error:
            said[name] = str(error)
    build(8, mesh)  # agreed on: the group still works
    return said


def test_ranks_that_disagree_are_told_so_when_the_layer_is_built():
    for said in ranks.run(4, disagree):
        assert said.keys() == DISAGREEMENTS.keys()
        for name, (_, text) in DISAGREEMENTS.items():
            assert "ExpertParallelMoE (layer " in said[name]
            assert text in said[name], said[name]


# What rank 1 does otherwise in a step, and what every rank is told.
LATER = {
    "dtype": ("dtype of x float32 on ranks 0, 2, 3 and bfloat16 on rank 1", lambda layer, x: layer(x.bfloat16())),
    "chunks": ("chunks 1 on ranks 0, 2, 3 and 2 on rank 1", lambda layer, x: with_chunks(layer, x)),
    "top_k": ("top_k 2 on ranks 0, 2, 3 and 1 on rank 1", lambda layer, x: with_top_k(layer, x)),
    "gradients": ("gradient of x True on ranks 0, 2, 3 and False on rank 1", lambda layer, x: layer(x.detach())),
}


def with_chunks(layer, x):
    layer.experts.chunks = 2
    return layer(x)


def with_top_k(layer, x):
    layer.router.set_top_k(1)
    return layer(x)


def disagree_later():
    """In exact mode every step compares; nothing has travelled, and the group can go on."""
    mesh, said = mesh_of(dist.get_world_size()), {}
    for name, (_, otherwise) in LATER.items():
        layer = build(8, mesh, name=f"blocks.{name}")
        x = tokens(4, dtype=torch.float32).requires_grad_()
        layer(x).sum().backward()
        try:
            otherwise(layer, x) if dist.get_rank() == 1 else layer(x)
        except ValueError as error:
            said[name] = str(error)
    return said


def test_ranks_that_disagree_later_are_told_so_before_rows_travel():
    for said in ranks.run(4, disagree_later):
        assert said.keys() == LATER.keys()
        for name, (text, _) in LATER.items():
            assert f"(blocks.{name})" in said[name]
            assert text in said[name], said[name]


def absent():
    """Rank 1 builds one layer less."""
    mesh = mesh_of(dist.get_world_size())
    build(8, mesh)
    if dist.get_rank() == 1:
        return "left"
    with pytest.raises(RuntimeError, match=r"building ExpertParallelMoE \(layer 2\).*rank 1 did not answer"):
        build(8, mesh)
    return "told"


def test_a_rank_that_builds_fewer_layers_is_noticed():
    assert ranks.run(2, absent, timeout=TIMEOUT) == ["told", "left"]


def clock(folder, write=False):
    """When the faulty rank ended, on the clock that all processes share."""
    path = os.path.join(folder, "time")
    if write:
        with open(path + ".new", "w") as file:
            file.write(str(time.monotonic()))
        os.replace(path + ".new", path)
        return None
    with open(path) as file:
        return float(file.read())


def die(folder, layer):
    clock(folder, write=True)
    os.kill(os.getpid(), signal.SIGKILL)


def stop(folder, layer):
    clock(folder, write=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def leave(folder, layer):
    """An error of this rank's own, which the others cannot know."""
    clock(folder, write=True)
    raise SystemExit


def train(folder, fault, culprit, when):
    """Steps of training, in the middle of which one rank fails; the others say what they were told, and how late."""
    layer = build(8, mesh_of(dist.get_world_size()), name="blocks.3.moe")
    for step in range(5):
        x = tokens(6, dist.get_rank(), dtype=torch.float32).requires_grad_()
        try:
            if when == "forward" and step == 2 and dist.get_rank() == culprit:
                fault(folder, layer)
            y = layer(x)
            if when == "backward" and step == 2 and dist.get_rank() == culprit:
                fault(folder, layer)
            y.sum().backward()
        except RuntimeError as error:
            if step < 2:
                raise
            return step, str(error), time.monotonic() - clock(folder)
    return "nothing was noticed"


@pytest.mark.parametrize(
    ("fault", "when"),
    [
        (die, "forward"),
        (die, "backward"),
        (stop, "forward"),
        pytest.param(stop, "backward", marks=pytest.mark.long),  # another group timeout to wait for
        (leave, "forward"),
        (leave, "backward"),
    ],
)
def test_every_other_rank_is_told_of_a_fault_within_the_timeout(fault, when, tmp_path, record_property):
    world, culprit = 4, 1
    started = ranks.start(world, train, str(tmp_path), fault, culprit, when, timeout=TIMEOUT)
    outcomes = ranks.gather(*started, patience=60, without=culprit)
    late = []
    for rank, (said, error) in enumerate(outcomes):
        if rank == culprit:
            continue
        assert error is None, error
        step, text, seconds = said
        assert step == 2
        assert "blocks.3.moe" in text
        assert "rank 1 did not answer" in text, text
        late.append(seconds)
    record_property("seconds until every exception", late)
    print(f"{fault.__name__} in {when}: exceptions after {', '.join(f'{s:.2f}' for s in late)} s of {TIMEOUT} s")
    assert max(late) < TIMEOUT + 1
    if fault is not stop:
        assert max(late) < 1


TOKENS, STEPS = 12, 6  # 12 are even on 4 and on 3 ranks


def steps_of(layer, optimizer, first, world=1, rank=0, folder=None, fault=None):
    """The losses over all tokens of the steps from `first` on."""
    for step in range(first, STEPS):
        if fault is not None:
            fault(step)
        x = tokens(TOKENS, seed=step, dtype=torch.float32).chunk(world)[rank]
        loss = (layer(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if world > 1:
            average(layer)
            dist.all_reduce(loss := loss.detach() / world)
        clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        if folder:
            from torch.distributed import checkpoint
            from torch.distributed.checkpoint.state_dict import get_state_dict

            state = dict(zip(("model", "optimizer"), get_state_dict(layer, optimizer), strict=True))
            checkpoint.save(state, checkpoint_id=f"{folder}/{step}")
        yield loss.item()


def trainee(mesh=None, seed=0):
    layer = build(8, mesh, seed=seed, shared_inner=4)
    return layer, torch.optim.AdamW(layer.parameters(), lr=0.02)


def recover(folder):
    """Four ranks train and save every step; the third dies; the others form a group of three and go on."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def fault(step):
        if step == 3 and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    with pytest.raises(RuntimeError, match="rank 2 did not answer"):
        losses.extend(steps_of(*trainee(mesh_of(world)), 0, world, rank, folder, fault))
    dist.destroy_process_group()

    rank, world = [0, 1, None, 2][rank], world - 1
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=20), world_size=world, rank=rank)
    layer, optimizer = trainee(mesh_of(world), seed=1)
    state = dict(zip(("model", "optimizer"), get_state_dict(layer, optimizer), strict=True))
    checkpoint.load(state, checkpoint_id=f"{folder}/2")
    set_state_dict(layer, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    losses.extend(steps_of(layer, optimizer, 3, world, rank))
    return losses


def test_three_of_four_ranks_go_on_from_a_checkpoint(tmp_path):
    outcomes = ranks.gather(*ranks.start(4, recover, str(tmp_path), timeout=20))
    expected = list(steps_of(*trainee(), 0))
    assert expected[-1] < 0.95 * expected[0]
    for rank, (losses, error) in enumerate(outcomes):
        if rank == 2:
            assert isinstance(error, ranks.Lost)
            continue
        assert error is None, error
        assert losses == pytest.approx(expected, rel=1e-4)
