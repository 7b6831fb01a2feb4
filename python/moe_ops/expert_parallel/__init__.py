"""Experts spread over the ranks of a process group, on torch.distributed."""

from moe_ops.expert_parallel.gradients import clip_grad_norm_, ignore_in_ddp

MODES = {"exact": 0, "bounded": 1}

__all__ = ["clip_grad_norm_", "ignore_in_ddp"]
