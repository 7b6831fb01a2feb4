"""The table of compiled kernels: what follows from registers and shared memory, the main loop, and the check."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        ("sm_80", 32, 256, 0, 8),  # all 64 warps
        ("sm_80", 33, 256, 0, 6),  # registers go by 8 a thread
        ("sm_80", 255, 128, 0, 2),
        ("sm_80", 20, 32, 0, 32),  # the most blocks
        ("sm_80", 32, 256, 40 << 10, 4),
        ("sm_80", 32, 256, (40 << 10) + 1, 3),  # a kilobyte of each block is the system's
        ("sm_90a", 32, 256, 227 << 10, 1),
    ],
)
def test_blocks_on_a_processor(arch, registers, threads, shared, blocks):
    from kernel_table import blocks_on_processor

    assert blocks_on_processor(arch, registers, threads, shared) == blocks


def test_the_main_loop_is_the_innermost_one_that_multiplies():
    from sass import Instruction, Kernel

    names = ["MOV", "LDG.E.128", *["HMMA.16816.F32"] * 8, "LDGSTS.E.BYPASS.128", "BRA", *["HMMA.16816.F32"] * 9, "BRA"]
    code = [Instruction(16 * i, name) for i, name in enumerate(names)]
    code[11] = Instruction(11 * 16, "BRA", target=2 * 16)
    code[-1] = Instruction(code[-1].address, "BRA", target=0)  # around both
    kernel = Kernel("k", 32, 0, 0, code)
    assert kernel.main_loop() == code[2:12]
    assert (kernel.count("LDG", "128"), kernel.count("HMMA", code=kernel.main_loop())) == (1, 8)
    assert Kernel("k", 32, 0, 0, code[:2]).main_loop() == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["S2R", "ACQBULK", "PREEXIT", "LDG.E", "EXIT"], ""),
        (["BRA 3", "SYNCS.EXCH.64", "UTMACCTL.PF", "ACQBULK", "UTMALDG.3D", "BRA 4", "EXIT"], ""),  # as in a GEMM
        (["MEMBAR.ALL.GPU", "UCGABAR_ARV", "UCGABAR_WAIT", "CCTL.IVALL", "ACQBULK", "EXIT"], ""),  # of a cluster
        (["CCTL.PF2", "ACQBULK", "EXIT"], "CCTL.PF2 at 0x0, ahead of the wait for the grids ahead at 0x10"),
        (["S2R", "LDG.E", "EXIT"], "no wait for the grids ahead"),
        (["@ACQBULK", "LDG.E", "EXIT"], "no wait for the grids ahead"),
        (["LDG.E.128", "ACQBULK", "EXIT"], "LDG.E.128 at 0x0, ahead of the wait for the grids ahead at 0x10"),
        (["S2R", "RED.E.ADD", "ACQBULK", "EXIT"], "RED.E.ADD at 0x10, ahead of the wait for the grids ahead at 0x20"),
        (["UBLKPF", "ACQBULK", "EXIT"], "UBLKPF at 0x0, ahead of the wait for the grids ahead at 0x10"),
        (["EXIT", "ACQBULK", "EXIT"], "EXIT at 0x0, ahead of the wait for the grids ahead at 0x10"),
        (["BRA 3", "ACQBULK", "EXIT", "LDG.E"], "BRA at 0x0, ahead of the wait for the grids ahead at 0x10"),
        (["BRA", "ACQBULK", "EXIT"], "BRA at 0x0, ahead of the wait for the grids ahead at 0x10"),
        (["ACQBULK", "LDG.E.CONSTANT", "EXIT"], "LDG.E.CONSTANT at 0x10 of memory that grids ahead may write"),
    ],
)
def test_every_path_waits_for_the_grids_ahead(names, expected):
    from sass import Instruction, Kernel

    code = []
    for i, text in enumerate(names):
        name, _, target = text.partition(" ")
        to = 16 * int(target) if target else None
        code.append(Instruction(16 * i, name.lstrip("@"), to, predicated=name.startswith("@")))
    assert Kernel("k", 32, 0, 0, code).unordered_access() == expected


def test_template_arguments():
    from kernel_launches import split_arguments

    assert split_arguments("A, B<c, d>, (int)4>(P)") == ("A", "B<c, d>", "4")
    assert split_arguments("") == ()


@pytest.fixture
def library():
    """Two kernels as nvcc may have made them."""
    from sass import Instruction, Kernel, Library

    def kernels():
        symbols = "_ZN3moe14combine_kernelIfLi4EEEvNS_13CombineParamsE", "_ZN3moe10scale_gradENS_15ScaleGradLaunchE"
        code = [Instruction(0, "ACQBULK"), Instruction(16, "LDG.E.128")]
        return {symbol: Kernel(symbol, 57, 0, 0, [*code]) for symbol in symbols}

    return Library("13.0.88", {"sm_80": kernels(), "sm_90a": kernels()})


@pytest.mark.skipif(not shutil.which("c++") or not shutil.which("c++filt"), reason="needs a compiler of the host")
def test_the_check_tells_what_has_changed(library, tmp_path, capsys):
    from kernel_table import Table, check

    path = tmp_path / "table.md"
    table = Table(library)
    path.write_text(table.text())
    assert "| float32, 4 | 57 | 256 | 0 | 4 | 32 of 64 | 1, 0 |" in table.text()
    assert check(table, path) == []

    kernel = next(iter(library.kernels["sm_90a"].values()))
    kernel.registers = 64
    wrong = check(table, path)
    assert "-| float32, 4 | 57 | 256 | 0 | 4 | 32 of 64 | 1, 0 |" in wrong
    assert "+| float32, 4 | 57 / 64 | 256 | 0 | 4 | 32 of 64 | 1, 0 |" in wrong
    assert "regenerate it with `python bench/kernel_table.py" in wrong[-1]

    path.write_text(re.sub("13.0.88", "13.1.80", path.read_text()))
    assert check(table, path) == []
    assert "laws only" in capsys.readouterr().out
    kernel.stack = 8
    assert check(table, path) == ["combine<T, n>, float32, 4, sm_90a: 8 bytes of stack, 0 accesses to it"]

    kernel.stack = 0
    del kernel.code[0], library.kernels["sm_80"][kernel.symbol].code[0]
    assert check(table, path) == ["combine<T, n>, float32, 4, sm_90a: no wait for the grids ahead"]


def test_every_kernel_has_a_launch():
    from kernel_launches import LAUNCHES, read_templates

    assert set(read_templates()) == set(LAUNCHES)
