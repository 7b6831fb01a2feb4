"""Watching routers: RouterHealth shows how experts are used, RouterReplay plays a recorded routing back."""

from moe_ops.monitor.health import RouterHealth
from moe_ops.monitor.replay import RouterReplay

__all__ = ["RouterHealth", "RouterReplay"]
