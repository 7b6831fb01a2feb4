"""The experiments as a user runs them, small; what they compute from counts against loops."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--layers", "2", "--hidden", "32", "--inner", "16", "--experts", "4", "--context", "32", "--batch", "4"]


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("experiments", "train_tiny_lm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("experiments")
    full = module.parse
    monkeypatch.setattr(module, "parse", lambda arguments: full([*arguments, *SMALL]))
    yield module
    for name in ("experiments", "train_tiny_lm"):
        sys.modules.pop(name, None)


@pytest.mark.long_emulated
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("collapse", ("none", "aux", "bias", "max/mean")),
        ("dense", ("MoE, 2 of 4 experts", "dense, same active", "dense, same total")),
        ("specialise", ("an expert tells", "punctuation", "layer")),
    ],
)
def test_each_experiment(experiments, name, expected, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plot = tmp_path / "plot.png"
    monkeypatch.setattr(sys, "argv", ["experiments.py", name, "--steps", "2", "--plot", str(plot)])
    experiments.main()
    output = capsys.readouterr().out
    assert all(text in output for text in expected), output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_dense_is_of_equal_active_compute(experiments):
    moe = experiments.LanguageModel(8, experiments.parse([])).blocks[0].moe
    args = experiments.parse([])
    args.experts, args.top_k, args.inner = 1, 1, moe.router.top_k * args.inner
    dense = experiments.LanguageModel(8, args).blocks[0].moe
    active = moe.router.top_k * (moe.experts.w_in[0].numel() + moe.experts.w_out[0].numel())
    assert dense.experts.w_in.numel() + dense.experts.w_out.numel() == active


def test_information_is_that_of_a_loop(experiments):
    counts = torch.tensor([[30, 10, 0], [5, 5, 50]])
    total = counts.sum().item()
    mutual = of_class = 0.0
    for row in counts.tolist():
        of_class -= sum(row) / total * math.log(sum(row) / total)
        for e, n in enumerate(row):
            if n:
                mutual += n / total * math.log(n * total / (sum(row) * counts[:, e].sum().item()))
    assert experiments.information(counts) == pytest.approx(mutual / of_class)
    assert experiments.information(torch.tensor([[4, 0], [0, 9]])) == pytest.approx(1)
    assert experiments.information(torch.tensor([[4, 8], [2, 4]])) == pytest.approx(0, abs=1e-12)


def test_entropy_and_classes(experiments):
    assert experiments.entropy(torch.tensor([[1.0, 1, 1, 1], [4.0, 0, 0, 0]])).tolist() == pytest.approx([1, 0])
    named = [experiments.CLASSES[i] for i in experiments.class_of("aZ5 \n;").tolist()]
    assert named == ["lower", "upper", "digit", "space", "newline", "punctuation"]


def test_text_is_split_without_overlap(experiments):
    train, held_out = experiments.split()
    assert len(train.ids) + len(held_out.ids) == len(experiments.Text.load().ids)
    assert len(held_out.ids) > 10_000 and train.alphabet == held_out.alphabet
