"""transformers' models on moe_ops.

    moe_ops.integrations.transformers.enable()
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_ops")

`enable` serves the models whose experts are a plug-in (more than sixty families: docs/transformers.md); `replace`
changes the modules of those that are none. Both report what they did. The extra `transformers` brings the library in a
version that fits.
"""

from moe_ops.integrations.transformers.enabling import enable
from moe_ops.integrations.transformers.experts import experts_forward
from moe_ops.integrations.transformers.replacing import replace
from moe_ops.integrations.transformers.report import Report

__all__ = ["Report", "enable", "experts_forward", "replace"]
