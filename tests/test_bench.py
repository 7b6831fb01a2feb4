"""The benches: the arithmetic of roofs, fair turns, the check that stops a wrong variant, and what a run writes."""

import importlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
KEYS = {"name", "variant", "dtype", "shape", "median_s", "spread", "roof", "fraction_of_roof"}
TINY = "9,16,8,4,2"  # T, H, I, E, K


@pytest.fixture(autouse=True)
def bench_path(monkeypatch, pytestconfig):
    if pytestconfig.getoption("--device") != "cpu":
        pytest.skip("the benches run on the CPU")
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def roofs():
    from roofline import Roofs

    arithmetic = {"float32": 100e9, "float64": 50e9, "float16": 100e9, "bfloat16": 200e9}
    return Roofs(arithmetic, read=10e9, copy=5e9)


def test_the_roof_of_known_work(roofs):
    from roofline import Work

    assert roofs.seconds(Work(flops=1e9), "float32") == pytest.approx(0.01)
    assert roofs.seconds(Work(flops=1e9), "bfloat16") == pytest.approx(0.005)
    assert roofs.seconds(Work(read=1e9), "float32") == pytest.approx(0.1)
    assert roofs.seconds(Work(written=1e9), "float32") == pytest.approx(0.2)
    # 100 MB copied is 200 MB moved: 40 ms; 200 MB more are read: 20 ms.
    assert roofs.seconds(Work(read=3e8, written=1e8), "float32") == pytest.approx(0.06)
    assert roofs.seconds(Work(flops=1e9, read=1e9), "float32") == pytest.approx(0.1)
    assert roofs.seconds(Work(flops=1e11, read=1e9), "float32") == pytest.approx(1)
    assert roofs.rate(Work(flops=1e9), "float32", 0.02) == "50 GFLOP/s"
    assert roofs.rate(Work(read=1e9), "int32", 0.5) == "2 GB/s"


def test_the_work_of_a_known_layer():
    import roofline
    from roofline import Work
    from shapes import Shape

    s = Shape("", tokens=2, hidden=3, inner=4, experts=5, top_k=1)
    assert roofline.weights_of_expert(s) == (8 + 4) * 3
    forward = roofline.moe_forward(s, size=4, active=2)
    assert forward == Work(2 * 2 * 3 * 5 + 2 * 2 * 36, (2 * 3 + 2 * 36) * 4 + 5 * 3 * 4, 2 * 3 * 4)
    training = roofline.moe_training(s, size=4, active=2)
    assert training.flops == 3 * forward.flops
    router = 2 * s.tokens * s.hidden * s.experts
    assert roofline.dense(s, 4).flops == forward.flops - router
    plain = Shape("", 2, 3, 4, 5, 1, "relu", gated=False)
    assert roofline.weights_of_expert(plain) == (4 + 4) * 3
    gemm = roofline.grouped_gemm(s, size=2, n=8, k=3, active=2)
    assert gemm == Work(2 * 2 * 8 * 3, (2 * 3 + 2 * 8 * 3) * 2, 2 * 8 * 2)
    assert roofline.permute(s, size=2) == Work(0, 2 * 3 * 2 + 2 * 4, 2 * 3 * 2)


def test_this_machine_has_roofs():
    from moe_ops import _C
    from roofline import Roofs

    measured = Roofs.measure(cache_bytes=1 << 20, seconds=0.01)
    assert min(*measured.arithmetic.values(), measured.read, measured.copy) > 1e8
    for _ in range(100):  # on a busy machine a peak is found only with luck
        if measured.arithmetic["float32"] > 1.5 * measured.arithmetic["float64"]:
            break
        measured = measured.higher(Roofs.measure(cache_bytes=1 << 20, seconds=0.01))
    else:
        pytest.fail("float32 has twice the lanes of float64, but not the arithmetic")
    assert _C.roofs(1 << 20, 0.001)["read"] > 0
    higher = measured.higher(Roofs(measured.arithmetic, read=1e15, copy=0))
    assert (higher.read, higher.copy) == (1e15, measured.copy)


def test_more_bytes_in_order_take_longer():
    from device import wall_time
    from moe_ops import _C

    def shortest(read, written):
        work = _C.InOrder(read=read, written=written)
        return min(wall_time(work.run) for _ in range(10))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other longer than they move bytes
    try:
        small = shortest(1 << 20, 1 << 18)
        assert shortest(1 << 26, 1 << 18) > 4 * small
        assert shortest(1 << 20, 1 << 26) > 4 * small
        assert shortest(0, 1 << 26) > 4 * small
    finally:
        torch.set_num_threads(threads)


def test_more_flops_take_longer():
    from device import wall_time
    from moe_ops import _C

    def shortest(dtype, flops):
        return min(wall_time(lambda: _C.multiply_adds(dtype, flops)) for _ in range(10))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            assert shortest(dtype, 1e9) > 4 * shortest(dtype, 1e8), dtype
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match=r"multiply_adds: flops must lie within 0\.\.1e15, got -1"):
        _C.multiply_adds("float32", -1)
    with pytest.raises(ValueError, match=r"multiply_adds: flops must lie within 0\.\.1e15, got nan"):
        _C.multiply_adds("float32", float("nan"))
    with pytest.raises(
        ValueError, match="multiply_adds: dtype must be float64, float32, bfloat16 or float16, got int8"
    ):
        _C.multiply_adds("int8", 1)


def test_bytes_in_order_are_not_negative():
    from moe_ops import _C

    for read, written in ((-1, 0), (0, -64)):
        with pytest.raises(ValueError, match=f"InOrder: read and written must not be negative, got {read + written}"):
            _C.InOrder(read, written)


def test_median_and_spread():
    from timing import summarize

    assert summarize([3.0]).median_s == 3
    timing = summarize([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    assert (timing.median_s, timing.launches) == (6, 11)
    assert timing.spread == pytest.approx((10 - 2) / 6)


def test_variants_take_turns_and_the_oldest_operands():
    from timing import interleave

    calls = []
    launches = {name: lambda i, name=name: calls.append((name, i)) for name in "abc"}
    timings = interleave(launches, sets=4, budget_s=60, max_rounds=5)
    assert {timing.launches for timing in timings.values()} == {5}
    assert [i for _, i in calls] == [launch % 4 for launch in range(len(calls))]
    rounds = [{name for name, _ in calls[i : i + 3]} for i in range(0, len(calls), 3)]
    assert rounds == [{"a", "b", "c"}] * 6  # the first warms up


@pytest.mark.parametrize("min_rounds", [1, 3])
def test_a_budget_is_kept_but_for_the_first_rounds(min_rounds):
    from timing import interleave

    timings = interleave({"slow": lambda i: time.sleep(0.02)}, budget_s=0.01, min_rounds=min_rounds)
    assert timings["slow"].launches == min_rounds
    begun = time.monotonic()
    interleave({"slow": lambda i: time.sleep(0.02)}, budget_s=0.1, min_rounds=min_rounds)
    assert time.monotonic() - begun < 1


def test_what_computes_nothing_has_no_error_and_is_not_counted_as_checked(capsys):
    from bench_permute import bench_permute
    from report import Report, parse_args

    report = Report(parse_args("permute", ["--quick", "--shape", TINY]))
    report.ends_at = time.monotonic()
    bench_permute(report, *next(report.cases()))
    printed = capsys.readouterr().out
    moved = [line.split() for line in printed.splitlines() if line.startswith("same bytes in order")]
    assert len(moved) == 2 and all(line[-2] == "-" for line in moved)
    assert printed.count("of 3 variants") == 2


def test_quick_prints_every_row_however_little_time_is_left(capsys):
    from bench_moe import bench_layer
    from report import Report, parse_args

    report = Report(parse_args("moe", ["--quick", "--shape", TINY]))
    assert report.tables_left == 2
    report.ends_at = time.monotonic()  # as on a busy machine
    bench_layer(report, *next(report.cases()))
    rows = [(row.name, row.variant) for row, _ in report.results]
    assert len(rows) >= 8 and len(set(rows)) == len(rows)
    assert {(name, "moe_ops") for name in ("moe forward", "moe forward+backward")} <= set(rows)
    assert "no time is left of --quick" in capsys.readouterr().out


def test_an_error_is_relative_and_a_nan_is_infinite():
    from report import relative_error

    expected = torch.tensor([4.0, -8.0], dtype=torch.float64)
    assert relative_error(torch.tensor([4.0, -7.0]), expected) == pytest.approx(1 / 8)
    assert relative_error((expected, torch.tensor([4.0, math.nan])), (expected, expected)) == math.inf
    assert relative_error(expected[:1], expected) == math.inf


def test_shapes():
    from shapes import DEFAULT, QUICK, STANDING, parse

    assert parse("odd") is STANDING["odd"]
    assert parse("4,8,16,3,2").rows == 8
    assert all(name in STANDING for names in (*DEFAULT.values(), *QUICK.values()) for name in names)
    with pytest.raises(ValueError, match=r"shape: expected T,H,I,E,K .*; got '4,8'"):
        parse("4,8")


def test_a_wrong_variant_stops_the_bench(capsys):
    from report import Report, Variant, parse_args, relative_error
    from roofline import Work

    args = parse_args("moe", ["--shape", TINY, "--dtype", "float32", "--seconds", "0.01"])
    report = Report(args)
    exact = torch.ones(3, dtype=torch.float64)

    def variant(name, value):
        return Variant(name, lambda i: torch.full((3,), value), lambda y: relative_error(y, exact), Work(read=12))

    right, wrong = variant("moe_ops", 1.0), variant("loop", 1.001)
    with pytest.raises(SystemExit, match=r"check failed: sum, loop, T9 H16 .* float32: max error 1.00e-03"):
        report.table("sum", args.shape[0], torch.float32, [right, wrong])
    assert not report.results

    def refuse(i):
        raise RuntimeError("only even sizes")

    report.table("sum", args.shape[0], torch.float32, [right, Variant("even", refuse, wrong.check, Work(read=12))])
    assert [row.variant for row, _ in report.results] == ["moe_ops"]
    assert "even: not run: only even sizes" in capsys.readouterr().out


def check_rows(path, expected):
    rows = json.loads(path.read_text())
    assert {(row["name"], row["variant"]) for row in rows} >= {(name, "moe_ops") for name in expected}
    for row in rows:
        assert set(row) == KEYS
        assert all(isinstance(row[key], str) for key in ("name", "variant", "dtype", "shape"))
        assert row["median_s"] > 0 and row["spread"] >= 0 and row["roof"] > 0
        assert row["fraction_of_roof"] == pytest.approx(row["roof"] / row["median_s"])
    return rows


@pytest.mark.parametrize("verb", ["route", "plan", "permute", "grouped_gemm", "combine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_verb(verb, dtype, monkeypatch, tmp_path, capsys):
    arguments = ["--shape", TINY, "--dtype", dtype, "--seconds", "0.01", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", [f"bench_{verb}.py", *arguments])
    importlib.import_module(f"bench_{verb}").main()
    tables = {"plan": ("",), "grouped_gemm": (" forward", " input gradient", " weight gradient")}
    passes = tables.get(verb, (" forward", " forward+backward"))
    check_rows(tmp_path / "rows.json", [verb + each for each in passes])
    assert capsys.readouterr().out.count("checked: max error") == len(passes)


def test_the_layer_as_a_command(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCH / "bench_moe.py"), "--dtype", "float32", "--seconds", "0.1", "--shape", TINY]
    command += ["--keep-memory"] if platform.libc_ver()[0] == "glibc" else []
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path != str(BENCH))}
    run = subprocess.run([*command, *files], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    rows = check_rows(tmp_path / "rows.json", ["moe forward", "moe forward+backward"])
    variants = {row["variant"] for row in rows}
    assert {"moe_ops", "loop over experts", "dense, same FLOPs"} <= variants
    assert run.stdout.count("checked: max error") == 2
    assert ("freed memory is kept" in run.stdout) == ("--keep-memory" in command)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
