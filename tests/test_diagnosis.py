"""python -m moe_ops: what it reports, and that it names what is wrong."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch

import moe_ops

COMMAND = ("-c", "import sys, torch_moe_ops; sys.exit(torch_moe_ops.main())")  # what the script torch-moe-ops runs


def diagnose(first_on_path=None, command=("-m", "moe_ops"), **environment):
    """Runs the diagnosis in a process of its own: (exit status, output)."""
    path = os.pathsep.join(filter(None, [str(first_on_path or ""), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout + run.stderr


def test_report_names_versions_instruction_sets_and_every_operator():
    status, text = diagnose()
    assert status == 0, text
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["moe_ops"].startswith(moe_ops.__version__)
    for name in moe_ops._C.instruction_sets():
        assert name in text
    for name in ("route", "plan", "permute", "grouped_gemm", "combine", "moe_mlp"):
        assert any(line.startswith(f"check: {name}") and " ok" in line for line in text.splitlines()), text
    assert text.rstrip().endswith("all is well")


def test_chosen_instruction_set_is_reported():
    status, text = diagnose(MOE_OPS_CPU_ISA="portable")
    assert status == 0 and "portable chosen of" in text


def test_unknown_instruction_set_is_a_problem():
    status, text = diagnose(MOE_OPS_CPU_ISA="abacus")
    assert status == 1 and "PROBLEM: moe_ops: instruction set 'abacus'" in text and "portable" in text


def test_unknown_instruction_set_is_refused_by_the_import():
    environment = {**os.environ, "MOE_OPS_CPU_ISA": "abacus"}
    run = subprocess.run([sys.executable, "-c", "import moe_ops"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: moe_ops: instruction set 'abacus' is not one that this processor has: portable" in run.stderr
    assert "MOE_OPS_CPU_ISA" in run.stderr
    status, text = diagnose(command=COMMAND, MOE_OPS_CPU_ISA="abacus")
    assert status == 1 and "PROBLEM: ImportError: moe_ops: instruction set 'abacus'" in text


def test_the_command_gives_the_same_report():
    status, text = diagnose(command=COMMAND)
    assert status == 0 and "check: moe_mlp" in text and text.rstrip().endswith("all is well")


@pytest.fixture
def foreign(tmp_path):
    """A folder whose moe_ops is another distribution's, installed over ours: of our files only __main__.py is left."""
    (tmp_path / "moe_ops").mkdir()
    (tmp_path / "moe_ops" / "__init__.py").write_text("def fused_moe(): ...\n")
    shutil.copy(importlib.util.find_spec("moe_ops.__main__").origin, tmp_path / "moe_ops")
    record = tmp_path / "moe_ops-0.9.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-ops\nVersion: 0.9\n")
    (record / "top_level.txt").write_text("moe_ops\n")
    (record / "RECORD").write_text("moe_ops/__init__.py,,\n")
    return tmp_path


def test_foreign_package_is_named(foreign):
    status, text = diagnose(foreign)
    assert status == 1
    assert f"PROBLEM: the moe_ops imported from {foreign}" in text and "is not torch-moe-ops" in text
    assert "PROBLEM: the distribution moe-ops 0.9 installs files as moe_ops too: run `pip uninstall moe-ops`" in text


@pytest.mark.parametrize("content", ["def fused_moe(): ...", "raise RuntimeError('no GPU')"])
def test_foreign_package_in_place_of_ours_is_named_by_the_command(content, foreign):
    (foreign / "moe_ops" / "__init__.py").write_text(content + "\n")
    (foreign / "moe_ops" / "__main__.py").unlink()
    status, text = diagnose(foreign, COMMAND)
    assert status == 1
    assert "PROBLEM: the distribution moe-ops 0.9 installs files as moe_ops too: run `pip uninstall moe-ops`" in text
    if "def" in content:
        assert f"PROBLEM: the moe_ops imported from {foreign}" in text and "is not torch-moe-ops" in text
    else:
        assert "PROBLEM: RuntimeError: no GPU" in text


def test_foreign_distribution_beside_ours_is_named(foreign):
    shutil.rmtree(foreign / "moe_ops")
    status, text = diagnose(foreign)
    assert status == 1
    assert "PROBLEM: the distribution moe-ops 0.9 installs files as moe_ops too" in text
    assert "is not torch-moe-ops" not in text
