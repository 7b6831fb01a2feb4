"""Experts spread over the ranks of a process group, on torch.distributed."""

from moe_ops.expert_parallel.gradients import clip_grad_norm_, ignore_in_ddp
from moe_ops.expert_parallel.mlp import moe_mlp
from moe_ops.types import ExpertParallelPlan

__all__ = ["ExpertParallelPlan", "clip_grad_norm_", "ignore_in_ddp", "moe_mlp"]
