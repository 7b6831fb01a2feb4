"""How those who watch a model learn which experts its replaced modules were given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

LISTENERS = "_moe_ops_listeners"  # an attribute of the module, a list: RouterHealth adds to it

Listener = Callable[[Any, Tensor, int], None]  # of module, ids [T, K], number of experts


def tell(module: Any, ids: Tensor, num_experts: int) -> None:
    """Called by every forward that replace() puts into a model."""
    for listener in vars(module).get(LISTENERS, ()):
        listener(module, ids, num_experts)
