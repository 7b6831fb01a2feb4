"""Modules over the operators: a router chooses the experts, Experts holds and applies them, MoE is the whole layer.

Every constructor, function and method raises a TypeError or ValueError that names itself, the argument, what was
expected and what came. `device` and `dtype` are those of the parameters: float32, bfloat16, float16 or float64.
"""

from moe_ops.nn import init
from moe_ops.nn.balancing import LossFreeBalancing
from moe_ops.nn.cascade import Cascade
from moe_ops.nn.expert_choice import ExpertChoiceRouter
from moe_ops.nn.expert_parallel import ExpertParallelExperts
from moe_ops.nn.experts import Experts
from moe_ops.nn.hashing import HashRouter, balanced_table
from moe_ops.nn.hierarchical import HierarchicalRouter
from moe_ops.nn.moe import ExpertParallelMoE, MoE
from moe_ops.nn.noisy import NoisyTopKRouter
from moe_ops.nn.router import Router
from moe_ops.nn.router_base import LinearRouter, RouterBase
from moe_ops.nn.sparse_mixer import SparseMixerRouter
from moe_ops.nn.switch import SwitchRouter
from moe_ops.nn.training import GradientSmoothing, WarmUp, parameter_groups, router_parameters
from moe_ops.nn.zero_computation import ZeroComputationExperts

__all__ = [
    "Cascade",
    "ExpertChoiceRouter",
    "ExpertParallelExperts",
    "ExpertParallelMoE",
    "Experts",
    "GradientSmoothing",
    "HashRouter",
    "HierarchicalRouter",
    "LinearRouter",
    "LossFreeBalancing",
    "MoE",
    "NoisyTopKRouter",
    "Router",
    "RouterBase",
    "SparseMixerRouter",
    "SwitchRouter",
    "WarmUp",
    "ZeroComputationExperts",
    "balanced_table",
    "init",
    "parameter_groups",
    "router_parameters",
]
