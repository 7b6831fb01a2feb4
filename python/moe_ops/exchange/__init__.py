"""The exchange of rows between the ranks of a process group: what dispatch and combine do beyond one rank."""

from moe_ops.exchange.legs import check
from moe_ops.exchange.verbs import combine, dispatch

__all__ = ["check", "combine", "dispatch"]
