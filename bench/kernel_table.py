"""What nvcc made of each CUDA kernel: registers, shared memory, blocks on a processor, and the main loops of the GEMMs.

    python bench/kernel_table.py LIBRARY           # writes docs/kernels_table.md
    python bench/kernel_table.py LIBRARY --check   # compares with it, as .ci/cuda does

LIBRARY is a compiled libmoe_ops_cuda.so; no GPU is needed. Another nvcc allocates registers otherwise, so that then
only the laws are checked: nothing is spilled, no stack, as many blocks as the kernel was written for, products fed by
asynchronous copies of 16 bytes, and on sm_90 no access to global memory before the wait for the grids ahead.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kernel_launches import LAUNCHES, ROOT, Instance, launch_facts, name_instances
from sass import ARITHMETIC, Kernel, Library, find_cuobjdump, read_library

TABLE = ROOT / "docs/kernels_table.md"
REGENERATE = "regenerate it with `python bench/kernel_table.py <libmoe_ops_cuda.so>` and look at what has changed"

INTRO = """\
# What nvcc made of the kernels

Made by `bench/kernel_table.py` and compared in `.ci/cuda`; nvcc {compiler}.
Numbers are for {archs}, one where they agree. Shared memory is what a launch asks for; blocks and warps are those that
a processor holds at once, by registers, shared memory and warps. Wide: instructions that load from or store to global
memory 16 bytes a lane, asynchronous copies apart. No kernel spills or has a stack. What bounds the kernels stands in
[kernels.md](kernels.md), what the parameters of the templates mean in the sources.
"""


MULTIPLY = (
    "grouped_gemm",
    "grouped_gemm_sm90",
    "grouped_gemm_few_rows",
    "grouped_gemm_weight_grad",
    "grouped_gemm_weight_grad_sm90",
)
LOOP_COLUMNS = (*ARITHMETIC, "LDSM", "LDS", "LDGSTS", "LDG", "BAR")

# Of one processor: shared memory in bytes; the rest is the same on sm_80 and sm_90. CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"; 1 KiB of shared memory per block is the system's.
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_90a": 228 << 10}
REGISTERS, WARPS, BLOCKS, SYSTEM_SHARED = 65536, 64, 32, 1024


def blocks_on_processor(arch: str, registers: int, threads: int, shared: int) -> int:
    """As the occupancy calculator counts: registers go to warps by 256, and warps to four partitions."""
    warps = -(-threads // 32)
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // 4 // of_warp * 4 // warps
    by_shared = SHARED_MEMORY[arch] // (-(-shared // 128) * 128 + SYSTEM_SHARED)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


class Table:
    """The kernels of a library, all architectures side by side."""

    def __init__(self, library: Library):
        self.library = library
        self.architectures = sorted(library.kernels)
        symbols = sorted({symbol for kernels in library.kernels.values() for symbol in kernels})
        named = name_instances(symbols)
        self.instances = sorted(
            named.items(), key=lambda item: (list(LAUNCHES).index(item[1].family), item[1].readable)
        )
        self.facts = launch_facts([instance for _, instance in self.instances])

    def kernels(self, symbol: str) -> Iterator[tuple[str, Kernel]]:
        for arch in self.architectures:
            if symbol in self.library.kernels[arch]:
                yield arch, self.library.kernels[arch][symbol]

    def blocks(self, arch: str, kernel: Kernel, instance: Instance) -> list[int]:
        threads, _, shared = self.facts[instance]
        return [blocks_on_processor(arch, kernel.registers, threads, kernel.static_shared + size) for size in shared]

    def broken_laws(self) -> list[str]:
        found = []
        for symbol, instance in self.instances:
            for arch, kernel in self.kernels(symbol):
                name = f"{instance.title}, {instance.readable}, {arch}"
                if kernel.stack or kernel.local_accesses:
                    found.append(f"{name}: {kernel.stack} bytes of stack, {kernel.local_accesses} accesses to it")
                if int(re.sub(r"\D", "", arch)) >= 90 and (unordered := kernel.unordered_access()):
                    found.append(f"{name}: {unordered}")
                copied = instance.arguments[-1:] == ("true",) and "bool direct" in instance.parameters
                if copied and (slow := not_copied(kernel)):
                    found.append(f"{name}: in the main loop, {slow}")
                blocks, wanted = self.blocks(arch, kernel, instance)[0], self.facts[instance][1]
                if blocks < wanted:
                    found.append(f"{name}: {blocks} blocks on a processor, written for {wanted}")
        return found

    def text(self) -> str:
        lines = INTRO.format(compiler=self.library.compiler, archs=" / ".join(self.architectures)).splitlines()
        titles = list(dict.fromkeys(instance.title for _, instance in self.instances))
        for title in titles:
            lines += ["", f"## {title}", ""]
            lines += ["| instance | registers | threads | shared bytes | blocks | warps | wide loads, stores |"]
            lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
            lines += [self.row(symbol, instance) for symbol, instance in self.instances if instance.title == title]
        lines += [
            "",
            "## Main loops",
            "",
            "Instructions of the innermost loop that multiplies, those of a path not taken among them.",
        ]
        lines += [
            "",
            f"| kernel | all | {' | '.join(LOOP_COLUMNS)} | local |",
            "| --- " * (3 + len(LOOP_COLUMNS)) + "|",
        ]
        lines += [self.loop(symbol, instance) for symbol, instance in self.instances if instance.family in MULTIPLY]
        return "\n".join(lines) + "\n"

    def row(self, symbol: str, instance: Instance) -> str:
        kernels = list(self.kernels(symbol))
        threads, _, shared = self.facts[instance]
        blocks = [self.blocks(arch, kernel, instance) for arch, kernel in kernels]

        cells = (
            instance.readable,
            each([str(kernel.registers) for _, kernel in kernels]),
            str(threads),
            " or ".join(str(size) for size in dict.fromkeys(shared)),
            each([" or ".join(str(count) for count in dict.fromkeys(counts)) for counts in blocks]),
            each([f"{counts[0] * -(-threads // 32)} of {WARPS}" for counts in blocks]),
            each([f"{kernel.count('LDG', '128')}, {kernel.count('STG', '128')}" for _, kernel in kernels]),
        )
        return f"| {' | '.join(cells)} |"

    def loop(self, symbol: str, instance: Instance) -> str:
        columns = []
        for _, kernel in self.kernels(symbol):
            loop = kernel.main_loop()
            counts = [len(loop), *(kernel.count(kind, code=loop) for kind in LOOP_COLUMNS)]
            columns.append([*counts, kernel.count("LDL", code=loop) + kernel.count("STL", code=loop)])
        cells = [each([str(count) for count in counts]) for counts in zip(*columns, strict=True)]
        return f"| {instance.family}, {instance.readable} | {' | '.join(cells)} |"


def not_copied(kernel: Kernel) -> str:
    """What a main loop reads from global memory other than by asynchronous copies of 16 bytes; empty where nothing."""
    loop = kernel.main_loop()
    narrow = kernel.count("LDGSTS", code=loop) - kernel.count("LDGSTS", "128", loop)
    loads = kernel.count("LDG", code=loop)
    return f"{loads} loads from global memory, {narrow} copies of less than 16 bytes" if loads or narrow else ""


def each(values: list[str]) -> str:
    """Of the architectures in turn, or of all."""
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def check(table: Table, path: Path) -> list[str]:
    """What is wrong: broken laws, and where the nvcc is the table's, every difference."""
    wrong = table.broken_laws()
    kept = path.read_text() if path.is_file() else ""
    made_by = re.search(r"nvcc ([\d.]+)\.\n", kept)
    if made_by and made_by[1] != table.library.compiler:
        print(f"{path.name} was made with nvcc {made_by[1]}, this library with {table.library.compiler}: laws only")
    elif kept != table.text():
        diff = difflib.unified_diff(kept.splitlines(), table.text().splitlines(), path.name, "this build", lineterm="")
        wrong += [*diff, f"{path.name} does not describe this build: {REGENERATE}"]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--cuobjdump", help="the program; by default one that is found")
    args = parser.parse_args()
    table = Table(read_library(args.library, find_cuobjdump(args.cuobjdump)))
    wrong = check(table, args.table) if args.check else table.broken_laws()
    if not args.check:
        args.table.write_text(table.text())
    if wrong:
        sys.exit("\n".join(wrong))
    what = "agrees with" if args.check else "wrote"
    print(f"{what} {args.table}: {len(table.instances)} kernels for {', '.join(table.architectures)}")


if __name__ == "__main__":
    main()
