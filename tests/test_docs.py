"""The Python examples of docs/routing.md and of the README, run as they stand."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def blocks(path):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)


@pytest.mark.parametrize("path, most", [("docs/routing.md", 9), ("README.md", 2)])
def test_examples_run(path, most):
    """In their order, in one namespace; of the README those before transformers, which needs a model to load."""
    if not (ROOT / path).exists():
        pytest.skip("the documents are not there")
    torch.manual_seed(0)
    names = {}
    found = blocks(path)[:most]
    assert found
    for block in found:
        exec(compile(block, path, "exec"), names)


def test_commands_name_programs():
    """A script that the documents tell to run does something when it is run."""
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(each.read_text() for each in documents if each.exists())
    scripts = set(re.findall(r"python ((?:bench|examples)/\w+\.py)", text))
    assert [name for name in sorted(scripts) if "__main__" not in (ROOT / name).read_text()] == []
