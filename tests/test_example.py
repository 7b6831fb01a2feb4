"""The example as a user runs it: as a script, with either implementation, every way of balancing, and its plot."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "train_tiny_lm.py"
SMALL = ["--layers", "2", "--hidden", "32", "--inner", "16", "--experts", "4", "--context", "32", "--batch", "8"]


@pytest.fixture
def example(monkeypatch):
    """The script as a module, and a function that parses arguments as its command line does."""
    spec = importlib.util.spec_from_file_location("train_tiny_lm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def arguments(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *options])
        return module.parse()

    return module, arguments


def final_loss(output):
    """The number on the last line."""
    match = re.fullmatch(r"final loss: (\d+\.\d{4})", output.rstrip("\n").split("\n")[-1])
    assert match, output
    return float(match[1])


def test_script_runs_and_naive_experts_give_the_same_loss():
    losses = []
    for impl in ("moe_ops", "naive"):
        command = [sys.executable, SCRIPT, *SMALL, "--steps", "3", "--experts-impl", impl]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        losses.append(final_loss(result.stdout))
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.long_emulated
@pytest.mark.parametrize("balance", ["none", "aux", "bias"])
def test_loss_falls(example, balance):
    module, arguments = example
    args = arguments("--steps", "40", "--lr", "0.01", "--balance", balance)
    module.torch.manual_seed(0)
    text = module.Text.load()
    history = list(module.train(module.LanguageModel(len(text.alphabet), args), text, args))
    assert len(history) == 40
    assert history[0].loss > 4
    assert history[-1].loss < 3.5
    for step in history:
        assert step.load.shape == (2, 4)
        assert step.load.sum(1).tolist() == pytest.approx([4, 4])
    router = module.LanguageModel(8, args).blocks[0].moe.router
    assert (router.selection_bias is not None) == (balance == "bias")


@pytest.mark.long_emulated
def test_plot_sample_and_progress_bar(example, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    module, arguments = example
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich draws its bar as on a terminal
    arguments("--steps", "2", "--plot", str(tmp_path / "curve.png"), "--sample", "40")
    module.main()
    output = capsys.readouterr().out
    assert final_loss(output) > 3
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert len(output.split("\n", 1)[1]) > 40


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--steps", "0"], "argument --steps: expected at least 1, got 0"),
        (["--plot", "curve.png"], "argument --plot: needs matplotlib: pip install matplotlib"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(options, text, example, monkeypatch, capsys):
    module, arguments = example
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        arguments(*options)
    assert text in capsys.readouterr().err


def test_bars_show_the_load(example):
    module, _ = example
    load = module.torch.tensor([[0.0, 0.5, 1.0, 2.5], [0.01, 1.0, 1.0, 1.99]])
    assert module.bars(load) == "·▂▄█ ▁▄▄█"
