"""What a caller can get wrong where experts are spread over ranks."""

import pytest
import torch

import ranks
from expert_parallel_layers import HIDDEN, build, mesh_of, tokens
from moe_ops import expert_parallel, nn

# Options of MoE(mesh=...), and what is said of them.
WRONG = [
    ({"mode": "eager"}, ValueError, "mode must be one of 'exact', 'bounded', got 'eager'"),
    ({"rows_per_peer": 4}, ValueError, "rows_per_peer must be None where mode is 'exact', got 4"),
    ({"mode": "bounded", "rows_per_peer": -1}, ValueError, "rows_per_peer must be at least 0, got -1"),
    ({"chunks": 0}, ValueError, "chunks must be at least 1, got 0"),
    ({"chunks": 33}, ValueError, "chunks must be at most 32, got 33"),
    ({"chunks": "two"}, TypeError, "chunks must be an int, got str 'two'"),
    ({"gradients": "average"}, ValueError, "gradients must be one of 'mean', 'sum', got 'average'"),
    ({"name": 3}, TypeError, "name must be a str or None, got int 3"),
    ({"impl": "naive"}, ValueError, "impl must be 'moe_ops', got 'naive'"),
    ({"activation": "tanh"}, ValueError, "activation must be one of"),
]


def raises(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(f"nothing was raised: {text}")


def mistakes():
    mesh = mesh_of(1)
    for options, kind, text in WRONG:
        raises(kind, text, lambda options=options: build(4, mesh, **options))
    raises(ValueError, "got dimensions ('dp',)", lambda: build(4, mesh_of(1, names=("dp",))))
    text = 'mesh must be a DeviceMesh with a dimension named "ep", got int 4'
    raises(TypeError, text, lambda: nn.MoE(4, 4, 4, 2, mesh=4))
    raises(TypeError, text, lambda: nn.ExpertParallelMoE(4, 4, 4, 2, mesh=4))
    layer = nn.ExpertParallelMoE(HIDDEN, 5, 4, 2, mesh=mesh)
    raises(RuntimeError, "prepack is not available", layer.prepack)
    x = tokens(3, dtype=torch.float32)
    raises(ValueError, "plan must be None", lambda: layer.experts(x, *layer.router(x), plan=3))
    layer(x).sum().backward()
    from torch.distributed.tensor import DTensor, Partial

    whole = torch.nn.Parameter(torch.ones(4))
    whole.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    raises(ValueError, "must be sharded or replicated", lambda: expert_parallel.clip_grad_norm_([whole], 1.0))


def test_mistakes_are_named():
    ranks.run(1, mistakes)


@pytest.mark.parametrize("name", ["mode", "chunks", "gradients", "name", "rows_per_peer"])
def test_options_of_the_exchange_need_a_mesh(name):
    with pytest.raises(ValueError, match=f"{name} must not be given without mesh"):
        nn.MoE(HIDDEN, 5, 4, 2, **{name: "x"})


def test_clipping_names_what_is_wrong():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    for arguments, kind, text in (
        (([weight], 0.0), ValueError, "max_norm must be greater than 0, got 0.0"),
        (([weight], 1.0, -1), ValueError, "norm_type must be greater than 0, got -1"),
        (([weight], "1"), TypeError, "max_norm must be a number, got str '1'"),
        (([3], 1.0), TypeError, "parameters must be a Tensor or an iterable of Tensors, got int 3"),
    ):
        raises(kind, text, lambda arguments=arguments: expert_parallel.clip_grad_norm_(*arguments))
    twin = torch.nn.Parameter(torch.ones(3))
    twin.grad = weight.grad.clone()
    ours = expert_parallel.clip_grad_norm_(weight, 1.0)
    assert torch.equal(ours, torch.nn.utils.clip_grad_norm_(twin, 1.0))  # where nothing is sharded: torch's bits
    assert torch.equal(weight.grad, twin.grad)
    assert expert_parallel.clip_grad_norm_([], 1.0) == 0
