"""dispatch and moe_mlp where a rank dies, hangs or disagrees, without any layer around them; bad arguments."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import moe_ops
import ranks
from cases import DEVICE
from moe_ops import expert_parallel
from moe_ops.exchange.sending import owned

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="Gloo's ranks run on the CPU")
TIMEOUT = 3.0  # seconds, of the process group


def inputs(hidden=8, experts=6, top_k=2, dtype=torch.float32, tokens=5):
    first, last = owned(experts, dist.get_rank(), dist.get_world_size())
    ids = torch.arange(tokens * top_k).view(tokens, top_k) % experts
    leaves = {"x": torch.ones(tokens, hidden, dtype=dtype), "weights": torch.ones(tokens, top_k)}
    leaves |= {"w_in": torch.ones(last - first, 6, hidden, dtype=dtype)}
    leaves |= {"w_out": torch.ones(last - first, hidden, 3, dtype=dtype)}
    return {"experts": ids} | {name: value.requires_grad_() for name, value in leaves.items()}


def mlp(experts=6, requires_grad=True, sizes=None, **options):
    given = inputs(experts=experts, **(sizes or {}))
    given["x"].requires_grad_(requires_grad)
    return expert_parallel.moe_mlp(**given, group=dist.group.WORLD, num_experts=experts, name="layer 7", **options)


DISAGREEMENTS = {
    "hidden 8 on ranks 0, 2, 3 and 16 on rank 1": {"sizes": {"hidden": 16}},
    "num_experts 6 on ranks 0, 2, 3 and 8 on rank 1": {"experts": 8},
    "top_k 2 on ranks 0, 2, 3 and 3 on rank 1": {"sizes": {"top_k": 3}},
    "chunks 1 on ranks 0, 2, 3 and 2 on rank 1": {"chunks": 2},
    "dtype of x float32 on ranks 0, 2, 3 and bfloat16 on rank 1": {"sizes": {"dtype": torch.bfloat16}},
    "gradient of x True on ranks 0, 2, 3 and False on rank 1": {"requires_grad": False},
    "activation silu on ranks 0, 2, 3 and relu on rank 1": {"activation": "relu"},
    "capacity None on ranks 0, 2, 3 and 3 on rank 1": {"capacity": 3},
    "mode exact on ranks 0, 2, 3 and bounded on rank 1": {"mode": "bounded"},
}


def disagree():
    said = []
    for options in DISAGREEMENTS.values():
        with pytest.raises(ValueError) as caught:
            mlp(**(options if dist.get_rank() == 1 else {}))
        said.append(str(caught.value))
    return said, mlp().shape  # the group still works


def test_disagreement_is_an_error_on_every_rank_that_names_it():
    for said, shape in ranks.run(4, disagree):
        for text, expected in zip(said, DISAGREEMENTS, strict=True):
            assert text.startswith("expert_parallel.moe_mlp (layer 7): all ranks must agree, got ")
            assert expected in text, text
        assert shape == (5, 8)


def disagree_without_counts():
    """What Gloo would end a process for, or what would give one layer another's tokens."""
    odd, group, given = dist.get_rank() == 1, dist.group.WORLD, inputs()
    rows, plan = moe_ops.dispatch(given["x"], given["experts"], 6, group=group)
    narrow, frozen = rows[:, :4] if odd else rows, rows.detach() if odd else rows
    weights = given["weights"].detach() if odd else given["weights"]
    for text, broken in [
        ("rows_per_peer 5 on ranks 0, 2, 3 and 6 on rank 1", lambda: mlp(mode="bounded", sizes={"tokens": 5 + odd})),
        ("chunks 1 on ranks 0, 2, 3 and 2 on rank 1", lambda: mlp(mode="bounded", chunks=1 + odd)),
        ("gradient of x True on ranks", lambda: mlp(mode="bounded", requires_grad=not odd)),
        ("call 'dispatch (layer 0)' on ranks 0, 2, 3 and 'dispatch (layer 1)' on rank 1",
         lambda: moe_ops.dispatch(given["x"], given["experts"], 6, group=group, name=f"layer {int(odd)}")),
        ("call 'combine' on ranks 0, 2, 3 and 'dispatch' on rank 1", lambda: (
            moe_ops.dispatch(given["x"], given["experts"], 6, group=group)
            if odd else moe_ops.combine(rows, None, plan))),
        ("dtype of rows float32 on ranks 0, 2, 3 and bfloat16 on rank 1",
         lambda: moe_ops.combine(rows.bfloat16() if odd else rows, None, plan)),
        ("hidden 8 on ranks 0, 2, 3 and 4 on rank 1", lambda: moe_ops.combine(narrow, None, plan)),
        ("dtype of weights None on ranks 0, 2, 3 and float32 on rank 1",
         lambda: moe_ops.combine(rows, weights if odd else None, plan)),
        ("gradient of rows True on ranks 0, 2, 3 and False on rank 1", lambda: moe_ops.combine(frozen, None, plan)),
        ("gradient of weights True on ranks", lambda: moe_ops.combine(rows, weights, plan)),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            broken()
        assert "all ranks must agree, got " in str(caught.value)
        assert text in str(caught.value), str(caught.value)
    moe_ops.combine(rows, given["weights"], plan).sum().backward()  # the group still works


def test_disagreement_is_found_where_no_counts_are_exchanged():
    ranks.run(4, disagree_without_counts)


def part_of_the_job():
    """Groups of two in a job of four: errors number the ranks as the job does."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank, given = dist.get_rank(), inputs()
    group = groups[rank // 2]
    with pytest.raises(ValueError, match="top_k 2 on rank 2 and 3 on rank 3" if rank > 1 else "rank 0 and 3 on rank 1"):
        moe_ops.dispatch(given["x"], torch.zeros(5, 2 + rank % 2, dtype=torch.int32), 6, group=group)
    if rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        with pytest.raises(RuntimeError, match=r"failed on rank 2 of the group \[2, 3\]; rank 3 did not answer"):
            moe_ops.dispatch(given["x"], given["experts"], 6, group=group)


def test_ranks_of_a_part_of_the_job_are_numbered_as_in_the_job():
    outcomes = ranks.gather(*ranks.start(4, part_of_the_job, timeout=TIMEOUT), without=3)
    assert [error for _, error in outcomes[:3]] == [None, None, None]


def hang_with_the_store(port):
    """Rank 0, which holds the store of the group, stops as a whole process."""
    rank, timeout = dist.get_rank(), timedelta(seconds=1)
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout, world_size=2, rank=rank)
    mlp()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="the exchange between ranks failed on rank 1 of 2"):
        mlp()
    return time.monotonic() - begin


def test_the_store_hangs_with_the_rank_that_holds_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, (took, error) = ranks.gather(*ranks.start(2, hang_with_the_store, port), patience=20, without=0)
    assert error is None, error
    assert took < 3.0


def fail(how, where):
    """Rank 1 dies or hangs after a good run; what the others get, and when."""
    y = mlp()
    if where == "backward":
        y.sum().backward()
        y = mlp()
    if dist.get_rank() == 1:
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3 * TIMEOUT)
        return None
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        y.sum().backward() if where == "backward" else mlp()
    return time.monotonic() - begin, str(caught.value)


@pytest.mark.parametrize(("how", "where"), [("die", "forward"), ("die", "backward"), ("hang", "forward")])
def test_dead_or_hanging_rank_is_an_exception_on_all_others(how, where):
    outcomes = ranks.gather(*ranks.start(3, fail, how, where, timeout=TIMEOUT), without=1)
    for rank in (0, 2):
        (took, text), error = outcomes[rank]
        assert error is None
        assert text.startswith(
            f"expert_parallel.moe_mlp (layer 7): the exchange between ranks failed on rank {rank} of 3"
        )
        assert "; rank 1 did not answer: " in text
        assert took < (1.0 if how == "die" else TIMEOUT + 1.0)


@pytest.mark.long
def test_rank_that_hangs_in_backward():
    test_dead_or_hanging_rank_is_an_exception_on_all_others("hang", "backward")


def refuse():
    group, given = dist.group.WORLD, inputs()
    call = lambda **other: expert_parallel.moe_mlp(**{**given, "group": group, "num_experts": 6, **other})  # noqa: E731
    x, ids = given["x"], given["experts"]
    send = lambda **other: moe_ops.dispatch(x, ids, 6, **{"group": group, **other})  # noqa: E731
    rows, plan = send()
    _, weighted = send(weights=given["weights"])
    op = "expert_parallel.moe_mlp: "
    for text, error, broken in [
        (op + "group must be a ProcessGroup or a DeviceMesh, got int 3", TypeError, lambda: call(group=3)),
        (op + "group must hold this rank", ValueError, lambda: call(group=dist.GroupMember.NON_GROUP_MEMBER)),
        (op + "mode must be one of 'exact', 'bounded', got 'loose'", ValueError, lambda: call(mode="loose")),
        (op + "chunks must be at least 1, got 0", ValueError, lambda: call(chunks=0)),
        (op + "chunks must be at most 32, got 33", ValueError, lambda: call(chunks=33)),
        (op + "chunks must be 1 where a capacity is given, got 2", ValueError, lambda: call(chunks=2, capacity=1)),
        (op + "rows_per_peer must be None where mode is 'exact', got 4", ValueError, lambda: call(rows_per_peer=4)),
        (op + "rows_per_peer must be at least 0, got -1", ValueError, lambda: call(mode="bounded", rows_per_peer=-1)),
        (op + "w_in must hold this rank's experts 0..6 of 7, 7 in all", ValueError, lambda: call(num_experts=7)),
        (op + "num_experts must be an int, got None", TypeError, lambda: call(num_experts=None)),
        (op + "experts must be of dtype int32 or int64, got float32", TypeError, lambda: call(experts=ids.float())),
        (op + "name must be a str or None, got int 7", TypeError, lambda: call(name=7)),
        (op + "what shared returns must be of shape [tokens, hidden] = [5, 8], got [1, 8]", ValueError,
         lambda: call(shared=lambda: x[:1])),
        (op + "what shared returns must have the dtype of x (float32), got float64", TypeError,
         lambda: call(shared=x.double)),
        (op + "shared must be None or callable, got int 3", TypeError, lambda: call(shared=3)),
        (op + "activation must be one of 'silu'", ValueError, lambda: call(activation="swish")),
        (op + "limit must be greater than 0, got 0", ValueError, lambda: call(limit=0)),
        (op + "drop_policy must be one of 'position'", ValueError, lambda: call(drop_policy="random")),
        ("moe_mlp: weights must be of shape [5, top_k]", ValueError, lambda: call(weights=given["weights"][:3])),
        ("dispatch: mode must be one of", TypeError, lambda: send(mode=None)),
        ("dispatch: group must be a ProcessGroup", TypeError, lambda: send(group="default")),
        ("combine: weights must be None, as dispatch was given weights", ValueError,
         lambda: moe_ops.combine(rows, given["weights"], weighted)),
        ("combine: weights must be of shape [tokens, top_k] = [5, 2]", ValueError,
         lambda: moe_ops.combine(rows, given["weights"][:, :1], plan)),
        ("combine: plan must be of as many rows", ValueError, lambda: moe_ops.combine(rows[:-1], None, plan)),
    ]:  # fmt: skip
        with pytest.raises(error) as caught:
            broken()
        assert str(caught.value).startswith(text), str(caught.value)


def test_bad_arguments_are_named():
    ranks.run(1, refuse)
