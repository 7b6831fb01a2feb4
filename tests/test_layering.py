"""The architecture, held by tests: a layer includes only what stands below it.

The same rules run over planted offenders, so that a rule that has gone blind is noticed.
"""

import ast
import re
from pathlib import Path

import pytest

from moe_ops import checks, fakes
from moe_ops.library import OPERATORS

ROOT = Path(__file__).parent.parent
SOURCES = (".h", ".cpp", ".cu", ".cuh")
MAX_LINES = 400

# What the files of a folder of csrc may include, the longest folder that fits deciding. "device.h" is whichever device
# the include path selects; cpu/scratch.h is memory that kernels of an instruction set work in.
INCLUDES = {
    "stages": ["stages/"],
    "ops": ["ops/", "stages/", "device.h"],
    "cpu/isa": ["cpu/isa/", "cpu/scratch.h", "stages/"],
    "cpu": ["cpu/", "stages/", "device.h"],
    "cuda/arch": ["cuda/arch/"],
    "cuda/kernels": ["cuda/kernels/", "cuda/arch/", "stages/"],
    "cuda/launch": ["cuda/launch/", "cuda/kernels/", "cuda/arch/", "stages/", "device.h"],
    "cuda": ["cuda/", "stages/", "device.h"],
    "python": ["cpu/", "cuda/architectures.h", "cuda/launch/", "stages/"],
}
# torch is known to the operators, to the CPU's stages for its threads (not to what runs in one), to CUDA's device.
TORCH_IN = ("ops", "cpu")
TORCH_IN_FILE = "cuda/device.cpp"

# Modules of the package from the bottom up, and what each may import of it.
IMPORTS = {
    "_C": [],
    "types": [],
    "library": [],
    "cuda": ["_C", "library"],
    "autocast": [],
    "reference": ["types"],
    "checks": ["types"],
    "module_checks": ["checks", "types"],
    "packing": ["_C", "checks", "types"],
    "numerics": ["checks", "library"],
    "fakes": ["checks", "packing", "types"],
    "autograd": ["library", "types"],
    "ops": ["autocast", "autograd", "checks", "cuda", "fakes", "library", "numerics", "packing", "types"],
    "exchange": ["checks", "exchange", "ops", "types"],
    "functional": ["autocast", "autograd", "checks", "exchange", "numerics", "ops", "packing", "types"],
    "expert_parallel": [
        "autocast",
        "checks",
        "exchange",
        "expert_parallel",
        "functional",
        "module_checks",
        "ops",
        "packing",
        "types",
    ],
    "losses": ["checks", "module_checks", "types"],
    "nn": [
        "autocast",
        "checks",
        "exchange",
        "expert_parallel",
        "functional",
        "module_checks",
        "nn",
        "ops",
        "packing",
        "reference",
        "types",
    ],
    "config": ["checks", "config", "module_checks", "nn"],
    "monitor": ["checks", "module_checks", "monitor", "nn", "ops", "reference", "types"],
    "integrations": ["checks", "functional", "integrations", "ops"],
}
ENTRY_POINTS = ("__init__", "__main__")  # these may import anything


def layer_of(path: str) -> str:
    return max((folder for folder in INCLUDES if path.startswith(folder + "/")), key=len, default="")


def code_of(text: str) -> str:
    """The source without comments, its lines kept."""
    text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def offences_in_csrc(csrc: Path) -> list[str]:
    found = []
    for file in sorted(path for path in csrc.rglob("*") if path.suffix in SOURCES):
        path, code = file.relative_to(csrc).as_posix(), code_of(file.read_text())
        layer = layer_of(path)
        allowed = INCLUDES.get(layer)
        if allowed is None:
            found.append(f"{path} lies in no layer")
            continue
        for ours in re.findall(r'#\s*include\s*"([^"]+)"', code):
            if not any(ours == entry or (entry.endswith("/") and ours.startswith(entry)) for entry in allowed):
                found.append(f"{path} includes {ours}")
        for theirs in re.findall(r"#\s*include\s*<([^>]+)>", code):
            if re.match(r"(torch|ATen|c10)/", theirs) and layer not in TORCH_IN and path != TORCH_IN_FILE:
                found.append(f"{path} includes {theirs}")
            if theirs.startswith("pybind11/") and layer != "python":
                found.append(f"{path} includes {theirs}")
        if re.search(r"\b(asm|__asm__)\b\s*(volatile|__volatile__)?\s*\(", code) and not path.startswith("cuda/arch/"):
            found.append(f"{path} has asm")
        if "__CUDA_ARCH__" in code and not path.startswith("cuda/arch/"):
            found.append(f"{path} asks for __CUDA_ARCH__")
        if re.search(r"#\s*if.*\b(__CUDACC__|USE_CUDA|MOE_CUDA)\b", code):
            found.append(f"{path} selects its device by #if")
    return found


def imports_of(file: Path) -> set[str]:
    """The modules of moe_ops that a file imports."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "moe_ops" if node.level else node.module or ""
            if node.level and node.module:
                base += "." + node.module
            modules |= {f"{base}.{alias.name}" for alias in node.names} if base == "moe_ops" else {base}
    return {name.split(".")[1] for name in modules if name.startswith("moe_ops.")}


def offences_in_package(package: Path) -> list[str]:
    found = []
    for file in sorted(package.rglob("*.py")):
        module = file.relative_to(package).parts[0].removesuffix(".py")
        if module in ENTRY_POINTS:
            continue
        if module not in IMPORTS:
            found.append(f"{file.relative_to(package)} lies in no layer")
            continue
        found += [f"{module} imports {name}" for name in sorted(imports_of(file) - set(IMPORTS[module]))]
    return found


def long_files(root: Path) -> list[str]:
    folders = ("csrc", "python", "tests", "bench", "examples")
    files = (path for folder in folders for path in (root / folder).rglob("*") if path.suffix in (*SOURCES, ".py"))
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    return [f"{path.relative_to(root)} has {n} lines" for path, n in lengths.items() if n > MAX_LINES]


def test_csrc_layers():
    assert offences_in_csrc(ROOT / "csrc") == []


def test_package_layers():
    assert offences_in_package(ROOT / "python" / "moe_ops") == []


def test_file_length():
    assert long_files(ROOT) == []


def declared(file: Path) -> set[str]:
    """The functions and structs of a header of csrc/cuda/arch, or of its twin."""
    code = code_of(file.read_text()) if file.is_file() else ""
    functions = re.findall(r"^(?:[\w:&<>,*]+ )+\*?(\w+)(?:<[^;()]*>)?\(", code, flags=re.MULTILINE)
    return {*functions, *re.findall(r"^struct (?:alignas\([^{;]*\) )?(\w+)", code, flags=re.MULTILINE)}


def without_twin(arch: Path, twins: Path) -> list[str]:
    return [f"{f.name}: {name}" for f in sorted(arch.glob("*.cuh")) for name in declared(f) - declared(twins / f.name)]


def test_every_instruction_has_a_twin(tmp_path):
    """tests/simt says in C++ what each function of csrc/cuda/arch means."""
    arch = ROOT / "csrc" / "cuda" / "arch"
    assert {"launch", "shared", "Launch"} <= declared(arch / "launch.cuh")
    assert without_twin(arch, ROOT / "tests" / "simt" / "cuda" / "arch") == []
    (tmp_path / "warp.cuh").write_text("template <class T>\n__device__ __forceinline__ T* look(T* at) {}\n")
    assert without_twin(tmp_path, arch) == ["warp.cuh: look"]


def test_imports_are_ordered():
    """A module imports only modules listed before it, so that there is no cycle."""
    seen: list[str] = []
    for module, allowed in IMPORTS.items():
        assert set(allowed) - {module} <= set(seen), module
        seen.append(module)


def test_one_list_of_operators():
    """library.cpp, the Python list, the fakes and the registrations name the same operators."""
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "ops" / "library.cpp").read_text())
    assert tuple(schemas) == OPERATORS
    assert tuple(fakes.FAKES) == OPERATORS
    others = [file for file in (ROOT / "csrc" / "ops").glob("*.cpp") if file.name != "library.cpp"]
    registered = [name for file in others for name in re.findall(r'const Register \w+\("(\w+)"', file.read_text())]
    assert sorted(registered) == sorted(OPERATORS)


@pytest.mark.parametrize(
    ("enum", "table"),
    [
        ("Score", checks.SCORES),
        ("GroupScore", checks.GROUP_SCORES),
        ("GroupMask", {"minus_inf" if name == "-inf" else name: n for name, n in checks.GROUP_MASKS.items()}),
        ("Renormalize", {{False: "none", True: "sum"}.get(name, name): n for name, n in checks.RENORMALIZE.items()}),
        ("DropPolicy", checks.DROP_POLICIES),
        ("Act", checks.ACTIVATIONS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_have_the_numbers_of_params_h(enum, table):
    listed = re.search(rf"enum class {enum} : int8_t {{([^}}]*)}}", (ROOT / "csrc/stages/params.h").read_text())
    names = [name.strip() for name in listed[1].split(",")]
    assert table == {name: number for number, name in enumerate(names)}


@pytest.mark.parametrize(
    ("path", "text", "offence"),
    [
        ("stages/bad.h", '#include "cpu/isa.h"', "includes cpu/isa.h"),
        ("stages/bad.h", "#include <torch/csrc/stable/tensor.h>", "includes torch/csrc"),
        ("ops/bad.cpp", '#include "cpu/device.h"', "includes cpu/device.h"),
        ("ops/bad.cpp", '#include "device.hpp"', "includes device.hpp"),
        ("cpu/isa/bad.h", '#include "cpu/parallel.h"', "includes cpu/parallel.h"),
        ("cpu/isa/bad.h", "# include <ATen/ATen.h>", "includes ATen"),
        ("cpu/bad.cpp", '#include "ops/check.h"', "includes ops/check.h"),
        ("cuda/kernels/bad.cuh", '#include "cuda/launch/variant.h"', "includes cuda/launch"),
        ("cuda/kernels/bad.cuh", 'asm volatile("bar.sync 0;");', "has asm"),
        ("cuda/launch/bad.cu", "#include <torch/csrc/stable/tensor.h>", "includes torch/csrc"),
        ("cuda/device.h", "#include <torch/csrc/stable/tensor.h>", "includes torch/csrc"),
        ("cuda/launch/bad.cu", "#if __CUDA_ARCH__ >= 900", "asks for __CUDA_ARCH__"),
        ("ops/bad.cpp", "#ifdef USE_CUDA", "selects its device"),
        ("cpu/bad.cpp", "#include <pybind11/stl.h>", "includes pybind11"),
        ("elsewhere/bad.h", "", "lies in no layer"),
    ],
)
def test_offences_in_csrc_are_seen(path, text, offence, tmp_path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text + "\n")
    (seen,) = offences_in_csrc(tmp_path)
    assert path in seen and offence in seen


def test_comments_are_no_offence(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "fine.h").write_text('// #include "cpu/isa.h"\n/* asm("") */\n#include "stages/params.h"\n')
    assert offences_in_csrc(tmp_path) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("checks", "from moe_ops import ops"),
        ("ops", "from moe_ops.functional import dispatch"),
        ("types", "import moe_ops.checks"),
        ("functional", "from .nn import MoE"),
        ("autograd", "from . import ops"),
        ("unheard_of", ""),
    ],
)
def test_offences_in_the_package_are_seen(module, text, tmp_path):
    (tmp_path / f"{module}.py").write_text(text + "\n")
    assert len(offences_in_package(tmp_path)) == 1


def test_long_files_are_seen(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "long.cpp").write_text("\n" * (MAX_LINES + 1))
    assert long_files(tmp_path) == ["csrc/long.cpp has 401 lines"]
