"""The example as a user runs it: as a script, with either implementation, every way of balancing, its plot, several
processes, and what is left of them."""

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
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
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


def script(*options, ranks=0):
    """Runs it, under torchrun where it has ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    parallel = ["--ep", str(ranks), "--timeout", "20"] if ranks else []
    command = [sys.executable, *launcher, str(SCRIPT), *SMALL, *parallel, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def curve(output):
    """The losses of the steps that were printed."""
    return {int(step): float(loss) for step, loss in re.findall(r"step +(\d+)/\d+ +loss (\d+\.\d+)", output)}


def test_script_runs_and_naive_experts_give_the_same_loss():
    losses = []
    for impl in ("moe_ops", "naive"):
        result = script("--steps", "3", "--experts-impl", impl)
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
        (["--ep", "2"], "argument --ep: expected the number of processes of torchrun (0), got 2"),
        (["--kill-rank-at", "3"], "argument --kill-rank-at: needs --ep of at least 2, got 0"),
        (["--resume"], "argument --resume: needs --checkpoint FOLDER"),
        (["--plot", "curve.png"], "argument --plot: needs matplotlib: pip install matplotlib"),
    ],
)
def test_what_cannot_be_done_is_said_before_training(options, text, example, monkeypatch, capsys):
    module, arguments = example
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        arguments(*options)
    assert text in capsys.readouterr().err


def test_processes_that_would_all_train_the_same_are_refused(example, monkeypatch, capsys):
    _, arguments = example
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        arguments()
    assert "argument --ep: expected the number of processes of torchrun (2), got 0" in capsys.readouterr().err


def test_bars_show_the_load(example):
    module, _ = example
    load = module.torch.tensor([[0.0, 0.5, 1.0, 2.5], [0.01, 1.0, 1.0, 1.99]])
    assert module.bars(load) == "·▂▄█ ▁▄▄█"


def in_process(example, capsys, *options):
    module, arguments = example
    arguments(*options)
    module.main()
    return capsys.readouterr().out


def test_two_ranks_train_as_one_a_killed_rank_is_noticed_and_one_goes_on(example, tmp_path, capsys):
    options = ["--steps", "20", "--lr", "0.01"]
    alone = in_process(example, capsys, *options)
    saved = [*options, "--checkpoint", str(tmp_path), "--save-every", "5"]
    faulty = script(*saved, "--kill-rank-at", "13", ranks=2)
    assert faulty.returncode == 1
    assert curve(faulty.stdout)[10] == pytest.approx(curve(alone)[10], abs=2e-4)
    seconds, text = re.search(r"rank 0, (\d+\.\d+) s after its last step: (.*)", faulty.stderr).groups()
    assert float(seconds) < 20
    assert "blocks.0.moe" in text
    assert "final loss" not in faulty.stdout
    resumed = in_process(example, capsys, *saved, "--resume")
    assert curve(resumed).keys() == {20}
    assert final_loss(resumed) == pytest.approx(final_loss(alone), abs=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("more", [["--balance", "bias"], ["--ep-chunks", "2"], ["--ep-mode", "bounded"]])
def test_what_two_ranks_began_more_ranks_end(more, example, tmp_path, capsys):
    options = ["--steps", "20", "--lr", "0.01", *more]
    alone = in_process(example, capsys, *options)
    saved = [*options, "--checkpoint", str(tmp_path), "--save-every", "10"]
    assert script(*saved, "--kill-rank-at", "11", ranks=2).returncode == 1
    resumed = script(*saved, "--resume", ranks=4)
    assert resumed.returncode == 0, resumed.stderr
    assert final_loss(resumed.stdout) == pytest.approx(final_loss(alone), abs=2e-4)
