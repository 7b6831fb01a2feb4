"""bench/gpu_check.sh where things are missing, its steps with programs that fail or hang, the report, predictions."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench/gpu_check.sh"

pytestmark = pytest.mark.skipif(
    not shutil.which("bash") or not shutil.which("timeout"), reason="needs bash and timeout"
)


@pytest.fixture
def bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.fixture
def run(tmp_path, pytestconfig):
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("a script of the host")

    def call(**environment):
        results = tmp_path / "results"
        settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GPU_CHECK_RESULTS": str(results), **environment}
        return subprocess.run([str(SCRIPT)], env=settings, capture_output=True, text=True, timeout=120), results

    return call


def test_without_a_gpu_it_says_so_and_ends(run):
    done, results = run(PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert "build: passed over:" in done.stdout and "=== done" in done.stdout
    assert "Nothing is written: there was no GPU." in done.stdout
    assert not results.exists()


def test_without_torch_it_says_so(run, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done, _ = run(PYTHON=str(python))
    assert done.returncode == 1
    assert "torch cannot be imported: ModuleNotFoundError: No module named 'torch'" in done.stdout
    assert "there is no nowhere" in run(PYTHON="nowhere")[0].stdout


def test_a_step_that_fails_or_hangs_is_noted_and_the_next_one_runs(tmp_path):
    functions = re.search(r"^say\(\).*?(?=^report\(\))", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    assert functions
    steps = """
step good 9 echo fine
step "bad one" 9 sh -c 'echo trouble; exit 3'
step slow 3 sleep 30
step missing 9 /nowhere/tool
budget=1
step late 9 echo never
pass_over other "it is not there"
"""
    program = f"set -u\nlogs={tmp_path} budget=600 python=python3\n{functions[0]}\n{steps}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    lines = [line.split("\t")[:2] for line in (tmp_path / "steps.tsv").read_text().splitlines()]
    assert lines == [
        ["good", "passed"],
        ["bad one", "failed (3)"],
        ["slow", "stopped after 3 s"],
        ["missing", "failed (127)"],
        ["late", "not run"],
        ["other", "not run"],
    ]
    assert "trouble" in done.stdout and "other: passed over: it is not there" in done.stdout


def test_the_report_puts_predictions_beside_measurements(bench_path, tmp_path):
    import gpu_report
    from shapes import STANDING

    row = {"name": "permute forward", "variant": "moe_ops", "dtype": "bfloat16", "shape": str(STANDING["olmoe"])}
    row |= {"median_s": 2e-4, "spread": 0.1, "roof": 1e-4, "fraction_of_roof": 0.5}
    (tmp_path / "bench_permute.json").write_text(json.dumps([row, {**row, "variant": "x[token]", "median_s": 4e-4}]))
    (tmp_path / "bench_half.json").write_text("[{")
    rows = gpu_report.read_rows(tmp_path)
    note = gpu_report.add_predictions(rows, "NVIDIA H100 80GB HBM3")
    # 4096 rows read with their slots, 32768 written, at 3.35 TB/s, and a launch of 3 us.
    assert rows[0]["predicted_s"] == pytest.approx((4096 * 4096 + 4 * 32768 + 32768 * 4096) / 3.35e12 + 3e-6)
    assert rows[1]["predicted_s"] is None
    text = gpu_report.markdown("NVIDIA H100 80GB HBM3", [["build", "passed", "9 s"]], rows, note)
    assert "| build | passed | 9 s |" in text
    named = "| permute forward | olmoe T4096 H2048 I1024 E64 K8 | bfloat16 |"
    assert f"{named} moe_ops | 0.2 | 10% | 0.04811 | 50% | 1.00x |" in text
    assert "x[token] | 0.4 | 10% |  | 50% | 2.00x |" in text
    assert "No time is predicted" in gpu_report.add_predictions(rows, "some other card")


def test_predictions_follow_tiles_and_waves(bench_path):
    import predict
    from shapes import Shape

    card = predict.CARDS["a100-sxm-80gb"]
    assert [predict.tile_turns(card, tiles, 2) for tiles in (1, 108, 109, 216, 217, 432)] == [1, 1, 2, 2, 3, 4]
    assert predict.card_of("NVIDIA A100-SXM4-80GB") is card and predict.card_of("NVIDIA L4") is None
    # 8 experts of 256 rows: 8 * 2 * 64 tiles [128, 128] of depth 4096, on 108 processors 4 waves of 2 and 2 turns more.
    seconds = predict.product(card, Shape("", 1024, 4096, 4096, 8, 2), 2, n=8192, k=4096)
    turns = 4 * 2 + 2
    assert seconds == pytest.approx(turns * 2 * 128 * 128 * 4096 / (312e12 / 108) + predict.LAUNCH)
    # One token: the weights of its two experts are read.
    few = predict.product(card, Shape("", 1, 4096, 4096, 8, 2), 2, n=8192, k=4096)
    assert few == pytest.approx((2 * 4096 + 2 * 8192 * 4096 + 2 * 8192) * 2 / 2.039e12 + predict.LAUNCH)


def test_predicted_bytes_through_l2(bench_path):
    import predict_sm90

    # Tiles of [128, 256] in 16 steps: 48 KiB each, 32 where both blocks of a cluster multiply the same weights.
    fetched = partial(predict_sm90.fetched, 132, n=2048, k=1024, epilogue="store")
    assert fetched(4096, 1, 1, gathers=True) == 32 * 8 * 16 * 48 * 1024
    assert fetched(4096, 1, 1, gathers=False) == 32 * 8 * 16 * 32 * 1024
    # 3 row tiles an expert, 8 columns of tiles: of two columns one pair multiplies different weights.
    assert fetched(3 * 128 * 8, 8, 8, gathers=False) == 8 * 4 * 16 * (2 * 2 * 32 + 2 * 48) * 1024
    # The backward epilogue is hidden: tiles of [128, 128] in turns.
    assert fetched(4096, 1, 1, epilogue="activate_backward", gathers=True) == 32 * 16 * 16 * 32 * 1024


def test_predict_prints_every_stage(bench_path, capsys):
    import predict

    predict.main(["--card", "h100-sxm", "--shape", "qwen3-30b"])
    printed = capsys.readouterr().out
    for line in ("moe forward+backward", "w_in forward", "w_out input gradient"):
        assert re.search(rf"{re.escape(line)} +predicted +[1-9]", printed)


def test_predictions_through_l2_are_for_the_tiles_of_each_product(bench_path):
    import predict
    from shapes import STANDING

    found = predict.through_l2(predict.CARDS["h100-sxm"], STANDING["qwen3-30b"], 2)
    steps = {  # two row tiles of each of 128 experts, columns of tiles, steps; KiB of a step
        "w_in forward": 256 * 6 * 32 * 48,
        "w_out forward": 256 * 8 * 12 * 32,  # in clusters
        "w_out input gradient": 256 * 6 * 32 * 32,  # its epilogue takes long: in turns
        "w_in input gradient": 256 * 8 * 24 * 32,  # in clusters
    }
    assert {name: count for name, (count, _) in found.items()} == {name: kib << 10 for name, kib in steps.items()}
    assert all(1e12 < rate < 12e12 for _, rate in found.values())


def test_a_bench_on_cuda_says_what_is_missing(bench_path, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from report import Report, parse_args

    with pytest.raises(SystemExit, match="--device cuda: "):
        Report(parse_args("permute", ["--device", "cuda"]))
    with pytest.raises(SystemExit):
        parse_args("permute", ["--device", "cuda", "--dtype", "float64"])
    assert "float64 is supported on the CPU only" in capsys.readouterr().err


def test_predictions_take_the_tiles_that_are_launched(bench_path):
    import predict
    from moe_ops import _C
    from shapes import STANDING

    cases = [(card, s) for card in predict.CARDS.values() for s in STANDING.values() if s.rows > predict.FEW_ROWS]
    for card, s in cases:
        tiles = _C.gemm_tiles(card.processors, "bfloat16", s.rows, s.experts, 2 * s.inner)
        assert (tiles["rows"] == 128) == predict.prefers_large_tiles(card, s, 2 * s.inner), (card.title, str(s))
        if card.wgmma_share > 0:
            tiles = _C.gemm_tiles(card.processors, "bfloat16", s.rows, s.experts, s.hidden, arch=90, k=s.inner)
            shares = predict.predict_sm90.fetches_for_one_another(s.rows, s.experts, gathers=False)
            assert tiles["cluster"] == (2 if shares else 1), (card.title, str(s))
