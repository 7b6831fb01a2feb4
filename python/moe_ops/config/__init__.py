"""MoEConfig: what says the MoE layers of a model, with presets of published ones and what they weigh."""

from moe_ops.config.config import MoEConfig
from moe_ops.config.describe import Description

__all__ = ["Description", "MoEConfig"]
