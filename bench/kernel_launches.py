"""The kernels of a compiled library by their names in the sources, and how each is launched: threads, shared memory and
the blocks on a processor that it was written for, computed from the sources by the host's compiler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Launch:
    """What a launch gives a kernel, in C++ and in terms of the kernel's template parameters."""

    threads: str
    shared: tuple[str, ...] = ("0",)  # bytes; several where the problem decides
    blocks: str = "1"  # on a processor at once: what the kernel was written for


# By the kernel's name, without `_kernel` at the end.
LAUNCHES = {
    "route_short": Launch("kRouteThreads", ("0", "sizeof(RouteShared<kQuads>)"), "blocks_per_processor(kQuads)"),
    "route_long": Launch("kLongThreads", ("sizeof(LongRouteShared)",), "2"),
    "route_backward_short": Launch(
        "kBackwardThreads", ("sizeof(RouteBackwardShared<kQuads>)",), "blocks_per_processor(kQuads)"
    ),
    "route_backward_long": Launch("kLongBackwardThreads", ("sizeof(LongRouteBackwardShared)",)),
    "count_segments": Launch("256"),
    "finish_statistics": Launch("256"),
    "scale_grad_of_chunks": Launch("kScaleGradThreads", ("sizeof(ScaleGradShared)",)),
    "scale_grad": Launch("kScaleGradThreads"),
    "plan_one_block": Launch("kPlanThreads", ("sizeof(PlanShared)",)),
    "plan_count": Launch("kPlanThreads", ("sizeof(PlanShared)",)),
    "plan_scan": Launch("kPlanScanWarps * 32", ("sizeof(PlanScanShared)",)),
    "plan_place": Launch("kPlanThreads", ("sizeof(PlanShared)",)),
    "plan_drop": Launch("kPlanThreads", ("sizeof(PlanShared)",)),
    "permute": Launch("kPermuteThreads"),
    "combine": Launch("kCombineThreads", blocks="4"),
    "combine_backward": Launch("kCombineThreads", blocks="4"),
    "grouped_gemm": Launch(
        "Config::value.threads()",
        ("sizeof(GemmShared<RowTiles<T, Config, direct>, WeightTiles<T, Config, k_major, direct>, Config>)",),
        "Config::value.blocks",
    ),
    "grouped_gemm_sm90": Launch("HopperTiles::kThreads", ("sizeof(HopperGemmShared<T, Config, k_major>)",)),
    "grouped_gemm_few_rows": Launch(
        "kFewRowsThreads", ("sizeof(FewRowsShared<T, FewRowsArithmetic<T, W, along_k>>)",), "2"
    ),
    "grouped_gemm_few_rows_finish": Launch("kFewRowsThreads", ("sizeof(Products<kFewRows<T>, cols>)",), "4"),
    "score_grad": Launch("kScoreGradThreads", blocks="8"),
    "grouped_gemm_weight_grad": Launch(
        "OuterProducts<T, tensor_cores>::kThreads",
        ("sizeof(WeightGradShared<T, tensor_cores>)",),
        "OuterProducts<T, tensor_cores>::kBlocks",
    ),
    "grouped_gemm_weight_grad_sm90": Launch("WeightGradTiles::kThreads", ("sizeof(HopperGradShared<T, Config>)",)),
    "grouped_gemm_bias_grad": Launch("kBiasGradThreads", ("sizeof(BiasGradShared<T>)",), "2"),
}


@dataclass(frozen=True)
class Instance:
    """One compiled kernel: its family, the template's parameters and the arguments, as in the sources."""

    family: str
    parameters: tuple[str, ...]  # "class T", "bool k_major"
    arguments: tuple[str, ...]

    @property
    def title(self) -> str:
        names = ", ".join(parameter.split()[-1] for parameter in self.parameters)
        return f"{self.family}<{names}>" if names else self.family

    @property
    def readable(self) -> str:
        shown = []
        for parameter, argument in zip(self.parameters, self.arguments, strict=True):
            kind, name = parameter.split()
            argument = READABLE.get(argument, argument)
            shown.append({"true": name, "false": f"no {name}"}[argument] if kind == "bool" else argument)
        return ", ".join(shown) or "-"


def read_templates() -> dict[str, tuple[str, ...]]:
    """The template parameters of each kernel in the sources."""
    head = re.compile(r"(?:template <([^>]*)>\s*)?__global__[^;{]*?\b(\w+)\(const __grid_constant__")
    found = {}
    for path in sorted((ROOT / "csrc/cuda/kernels").glob("*.cuh")):
        for parameters, name in head.findall(path.read_text()):
            found[name.removesuffix("_kernel")] = tuple(part.strip() for part in parameters.split(",") if part.strip())
    return found


def name_instances(symbols: list[str]) -> dict[str, Instance]:
    templates = read_templates()
    plain = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True).stdout.splitlines()
    instances = {}
    for symbol, name in zip(symbols, plain, strict=True):
        name = name.removeprefix("void ").replace("moe::", "").replace("(bool)1", "true").replace("(bool)0", "false")
        family, _, rest = name.partition("(")[0].partition("<") if "<" not in name else name.partition("<")
        family, arguments = family.removesuffix("_kernel"), split_arguments(rest)
        if family not in LAUNCHES or len(templates.get(family, ())) != len(arguments):
            raise SystemExit(f"{name}: not known here: say in LAUNCHES how {family} is launched")
        instances[symbol] = Instance(family, templates[family], arguments)
    return instances


def split_arguments(text: str) -> tuple[str, ...]:
    """ "A, B<c, d>>(..." to A and B<c, d>."""
    parts, depth = [""], 1
    for character in text:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if depth == 0:
            break
        if character == "," and depth == 1:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(re.sub(r"^\(\w+\)", "", part.strip()) for part in parts if part.strip())


READABLE = {
    "__nv_bfloat16": "bfloat16",
    "__half": "float16",
    "float": "float32",
    "arch::Pack<unsigned char, 1>": "1 byte",
    "arch::Pack<unsigned short, 1>": "2 bytes",
    "arch::Pack<unsigned int, 1>": "4 bytes",
    "arch::Pack<unsigned int, 2>": "8 bytes",
    "arch::Pack<unsigned int, 4>": "16 bytes",
}

Facts = dict[Instance, tuple[int, int, tuple[int, ...]]]  # threads, blocks wanted, bytes of shared memory


def launch_facts(instances: list[Instance]) -> Facts:
    """The launches' expressions, computed by the host's compiler from the sources."""
    headers = sorted(path.name for path in (ROOT / "csrc/cuda/kernels").glob("*.cuh"))
    lines = [f'#include "cuda/kernels/{name}"' for name in headers]
    lines += ['#include "cuda/launch/gemm_config.h"', "#include <cstdio>", "using namespace moe;", "int main() {"]
    for instance in instances:
        at = LAUNCHES[instance.family]
        bind = {"class": "using {} = {};", "int": "constexpr int {} = {};", "bool": "constexpr bool {} = {};"}
        names = [parameter.split() for parameter in instance.parameters]
        lines.append("{")
        lines += [bind[kind].format(name, a) for (kind, name), a in zip(names, instance.arguments, strict=True)]
        lines += [f'std::printf("%d ", int({expression}));' for expression in (at.threads, at.blocks, *at.shared)]
        lines.append('std::printf("\\n"); }')
    lines.append("}")
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "facts.cpp", Path(folder) / "facts"
        source.write_text("\n".join(lines))
        includes = [f"-I{ROOT / 'tests/simt'}", f"-I{ROOT / 'csrc'}"]
        # Only sizes are wanted: what the kernels call need not be there.
        link = "-Wl,--unresolved-symbols=ignore-all"
        compiler = ["c++", "-std=c++20", "-w", "-O0", *includes, str(source), link, "-o", str(program)]
        run = subprocess.run(compiler, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(f"the sizes of the launches do not compile:\n{run.stderr[:2000]}")
        output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    numbers = [[int(word) for word in line.split()] for line in output.splitlines()]
    return {instance: (row[0], row[1], tuple(row[2:])) for instance, row in zip(instances, numbers, strict=True)}
