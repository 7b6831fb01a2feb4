"""Reads what nvcc made of a CUDA library: the resources and the instructions of every kernel, by cuobjdump."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ARITHMETIC = ("HGMMA", "HMMA", "FFMA")  # what a product is made of; the first that a kernel has

# What may reach global memory, prefetches too; LD and ST where the compiler does not know which memory it is.
GLOBAL = {"LDG", "LD", "STG", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS", "CCTL"}
GLOBAL |= {"UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "UBLKCP", "UBLKPF", "UBLKRED"}
HARMLESS = {"CCTL.IVALL"}  # empties L1, as acquiring from a cluster does
WAIT, LEAVE = "ACQBULK", {"EXIT", "RET", "CALL", "BRX", "JMP", "JMX"}  # griddepcontrol.wait; ways out of straight code

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its suffixes, as in LDG.E.128
    target: int | None = None  # of a branch
    predicated: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]


@dataclass
class Kernel:
    symbol: str
    registers: int
    stack: int
    static_shared: int
    code: list[Instruction] = field(default_factory=list)

    def count(self, kind: str, width: str = "", code: list[Instruction] | None = None) -> int:
        """Instructions of a kind, or of those the ones with a suffix."""
        code = self.code if code is None else code
        return sum(i.kind == kind and (not width or width in i.name.split(".")) for i in code)

    @property
    def local_accesses(self) -> int:
        return self.count("LDL") + self.count("STL")

    def unordered_access(self) -> str:
        """Why it is not certain that each path waits for the grids ahead before it touches global memory; or empty.

        It is where the wait stands ahead of all accesses and nothing ahead of the wait leads past it. Loads of memory
        that must not change while a grid runs (ld.global.nc) have no place in one that starts early.
        """
        wait = next((i.address for i in self.code if i.kind == WAIT and not i.predicated), None)
        if wait is None:
            return "no wait for the grids ahead"
        for i in self.code:
            past = i.kind in LEAVE or (i.kind == "BRA" and (i.target is None or i.target > wait))
            if i.address < wait and (past or (i.kind in GLOBAL and i.name not in HARMLESS)):
                return f"{i.name} at {i.address:#x}, ahead of the wait for the grids ahead at {wait:#x}"
            if i.kind == "LDG" and "CONSTANT" in i.name.split("."):
                return f"{i.name} at {i.address:#x} of memory that grids ahead may write"
        return ""

    def main_loop(self) -> list[Instruction]:
        """The innermost loop with most of the arithmetic; empty where no loop multiplies."""
        kinds = Counter(i.kind for i in self.code)
        what = next((kind for kind in ARITHMETIC if kinds[kind] >= 8), "")
        spans = [(i.target, i.address) for i in self.code if i.target is not None and i.target < i.address]
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        loops = [[i for i in self.code if first <= i.address <= last] for first, last in inner]
        best = max(loops, key=lambda loop: self.count(what, code=loop), default=[])
        return best if self.count(what, code=best) >= 8 else []


@dataclass(frozen=True)
class Library:
    compiler: str  # "13.0.88"
    kernels: dict[str, dict[str, Kernel]]  # by architecture and symbol


def find_cuobjdump(named: str | None = None) -> str:
    """The one that is named, the system's, PyPI's, or the one that comes with Triton."""
    for module in () if named else ("nvidia.cu13", "nvidia.cuda_cuobjdump", "triton.backends.nvidia"):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            continue
        for place in (found and found.submodule_search_locations) or ():
            tool = Path(place) / "bin/cuobjdump"
            if tool.is_file() and not shutil.which("cuobjdump"):
                return str(tool)
    tool_path = shutil.which(named or "cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if tool_path is None:
        packages = "nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
        raise SystemExit(f"no cuobjdump was found: CUDA's own, or `pip install {packages}`, or --cuobjdump")
    return tool_path


def read_library(path: Path, cuobjdump: str) -> Library:
    compiler, kernels = "unknown", {}
    architecture = ""
    for line in _lines(cuobjdump, "-res-usage", path):
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            symbol = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            numbers = [int(number) for number in found.groups()]
            kernels.setdefault(architecture, {})[symbol] = Kernel(symbol, *numbers)
    code: list[Instruction] = []
    for line in _lines(cuobjdump, "-sass", path):
        if found := INSTRUCTION.match(line):
            address, name, operands = int(found[1], 16), found[3], found[4]
            target = TARGET.search(operands) if name.startswith("BRA") else None
            code.append(Instruction(address, name, int(target[1], 16) if target else None, bool(found[2])))
        elif found := re.match(r"\s*Function : (\w+)", line):
            code = kernels[architecture][found[1]].code
        elif found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
    for line in _lines(cuobjdump, "-elf", path):
        if found := re.search(r"Tool Version: .*V([\d.]+)", line):
            compiler = found[1]
            break
    return Library(compiler, kernels)


def _lines(cuobjdump: str, what: str, path: Path) -> list[str]:
    run = subprocess.run([cuobjdump, what, str(path)], capture_output=True, text=True, errors="replace", check=False)
    if run.returncode:
        raise SystemExit(f"{cuobjdump} {what} {path}: {run.stderr.strip() or 'failed'}")
    return run.stdout.splitlines()
