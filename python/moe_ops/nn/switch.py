"""SwitchRouter: one expert per token."""

from __future__ import annotations

import torch

from moe_ops.nn import init
from moe_ops.nn.router import Router


class SwitchRouter(Router):
    """The most probable expert, weighed by its softmax probability (Fedus et al. 2022, "Switch Transformers").

    The rest of the paper is the layer's: `MoE(..., top_k=1, router=SwitchRouter(...), capacity_factor=1.25)` gives an
    expert at most ceil(1.25 · tokens / num_experts) rows and passes zeros on for dropped tokens, which the residual
    connection around the layer carries. Who is dropped says drop_policy: "position" (the paper's: later tokens) or
    "probability" (the least sure ones; Riquelme et al. 2021, "V-MoE", batch prioritized routing).

    Args:
        hidden, num_experts, jitter, bias: as in `LinearRouter`; the weight starts as `init.truncated_normal_`.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        *,
        bias: bool = False,
        jitter: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden, num_experts, 1, bias=bias, jitter=jitter, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws the weight anew; the bias becomes zero."""
        super().reset_parameters()
        init.truncated_normal_(self.weight)
