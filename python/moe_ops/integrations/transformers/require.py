"""The version of transformers that this package can work with."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST = (5, 23)
EXTRA = "pip install 'torch-moe-ops[transformers]'"


def transformers(what: str) -> None:
    """Raises ImportError where transformers is missing or too old for its experts interface to take our function."""
    needed = f"{what}: transformers {OLDEST[0]}.{OLDEST[1]} or later is needed"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needed}, got none; the extra brings it: {EXTRA}") from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ImportError(f"{needed}, got {version}; the extra brings it: {EXTRA}")
