"""Modules over the operators: Router chooses the experts, Experts holds and applies them, MoE is the whole layer."""

from moe_ops.nn.experts import Experts
from moe_ops.nn.moe import MoE
from moe_ops.nn.router import Router

__all__ = ["Experts", "MoE", "Router"]
