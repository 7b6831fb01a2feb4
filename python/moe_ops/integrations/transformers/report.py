"""What was done to a model, module by module, and why not."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """The modules that were changed and those that were left alone; `print(report)` tells both.

    Attributes:
        replaced: module name -> what computes in its place.
        left: module name -> why it was left as it is.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"left {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "nothing to replace"
