"""Ranks that disagree, die or hang: every other rank gets an exception that says what happened, within the timeout."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import ranks
from expert_parallel_layers import HIDDEN, build, mesh_of, state_of, tokens

TIMEOUT = 4.0  # seconds, of the process group in tests of what hangs

# What rank 1 says instead, and what every rank is told.
DISAGREEMENTS = {
    "num_experts": ((9, {}), "num_experts 8 on ranks 0, 2, 3 and 9 on rank 1"),
    "chunks": ((8, {"chunks": 2}), "chunks 1 on ranks 0, 2, 3 and 2 on rank 1"),
    "mode": ((8, {"mode": "bounded"}), "mode 'exact' on ranks 0, 2, 3 and 'bounded' on rank 1"),
    "dtype": ((8, {"dtype": torch.bfloat16}), "dtype torch.float32 on ranks 0, 2, 3 and torch.bfloat16 on rank 1"),
    "activation": ((8, {"activation": "gelu"}), "activation 'silu' on ranks 0, 2, 3 and 'gelu' on rank 1"),
    "seed": ((8, {"seed": 7}), "torch's generator (its state, from torch.manual_seed) "),
    "top_k": ((8, {"top_k": 3}), "top_k 2 on ranks 0, 2, 3 and 3 on rank 1"),
    "two": ((8, {"bias": True, "gradients": "sum"}), "gradients 'mean' on ranks 0, 2, 3 and 'sum' on rank 1; bias False on"),
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
