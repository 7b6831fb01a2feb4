"""Builds the stages with nvcc, without torch, and loads them beside a CUDA runtime.

MOE_OPS_CUDA_RUNTIME names a folder whose libcudart is used instead of the toolkit's: an emulator's, for example.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "gpu"
SOURCES = [HERE / "stages.cpp", HERE / "device.cpp", *sorted((ROOT / "csrc/cuda/launch").rglob("*.cu"))]
HEADERS = [HERE / "device.h", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh"))]
# PTX alone: the driver compiles what a test launches, for the card that is there.
OPTIONS = ["-std=c++20", "-O3", "-lineinfo", "-cudart", "shared", "-Xcompiler", "-fPIC"]
ARCHITECTURES = ("80", "90a")  # the latter alone for what lies in launch/sm90


class Unavailable(Exception):
    """Why the stages cannot run on this machine."""


@cache
def nvcc() -> str:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if "CUDA_HOME" in os.environ:
        candidates.insert(1, os.environ["CUDA_HOME"] + "/bin/nvcc")
    for candidate in filter(None, candidates):
        if os.access(candidate, os.X_OK):
            return candidate
    raise Unavailable("there is no nvcc to build the stages with (CUDACXX or CUDA_HOME names one)")


@cache
def toolkit() -> tuple[str, Path]:
    """CUDA's major version, and the folder of its runtime."""
    text = subprocess.run([nvcc(), "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = Path(re.search(r"TOP=(.*)", text)[1])
    version = subprocess.check_output([nvcc(), "--version"], text=True)
    major = re.search(r"release (\d+)", version)[1]
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if (top / folder / f"libcudart.so.{major}").exists():
            return major, (top / folder).resolve()
    raise Unavailable(f"there is no libcudart.so.{major} beside {nvcc()}")


def _compile(source: Path, common: bytes) -> Path:
    key = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
    hopper = source.parent.name == "sm90"
    name = f"{source.stem}_sm90" if hopper else source.stem
    target = BUILD / f"{name}.{key}.o"
    if not target.exists():
        for old in BUILD.glob(f"{name}.*.o"):
            old.unlink()
        part = target.with_suffix(f".{os.getpid()}")
        targets = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHITECTURES[hopper:]]
        command = [nvcc(), *OPTIONS, *targets, "-I", ROOT / "csrc", "-I", HERE, "-c", source, "-o", part]
        subprocess.run(command, check=True)
        part.rename(target)
    return target


def build() -> Path:
    """The library; what has been compiled from the same sources before is used again."""
    BUILD.mkdir(parents=True, exist_ok=True)
    version = subprocess.check_output([nvcc(), "--version"])
    common = version + "".join(OPTIONS).encode() + b"".join(path.read_bytes() for path in HEADERS)
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda source: _compile(source, common), SOURCES))
    library = BUILD / "libmoe_ops_stages.so"
    if not library.exists() or any(each.stat().st_mtime > library.stat().st_mtime for each in objects):
        subprocess.run([nvcc(), "-shared", "-cudart", "shared", *objects, "-o", library], check=True)
    return library


def runtime() -> tuple[ctypes.CDLL, Path]:
    """The runtime that sees a device, and the folder it lies in; Unavailable says what is missing."""
    major, folder = toolkit()
    wanted = Path(os.environ.get("MOE_OPS_CUDA_RUNTIME", folder)).resolve()
    library = ctypes.CDLL(str(wanted / f"libcudart.so.{major}"), mode=ctypes.RTLD_GLOBAL)
    count = ctypes.c_int()
    if library.cudaGetDeviceCount(ctypes.byref(count)) != 0 or count.value == 0:
        raise Unavailable("there is no CUDA device (MOE_OPS_CUDA_RUNTIME can name a folder with an emulator's runtime)")
    return library, wanted


def build_program(name: str) -> Path:
    """One of arch/, for sm_90a."""
    target = BUILD / "arch" / name
    sources = [HERE / "arch" / f"{name}.cu", HERE / "device.cpp", ROOT / "csrc/cuda/launch/tensor_map.cu"]
    newest = max(path.stat().st_mtime for path in (*HEADERS, HERE / "arch" / "check.h", *sources))
    if not target.exists() or target.stat().st_mtime < newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        options = [*OPTIONS, "-gencode=arch=compute_90a,code=compute_90a", "-I", ROOT / "csrc", "-I", HERE]
        subprocess.run([nvcc(), *options, *sources, "-o", target], check=True)
    return target


def load() -> ctypes.CDLL:
    """The stages, ready to run; Unavailable says what is missing."""
    _, wanted = runtime()
    library = ctypes.CDLL(str(build()))
    library.runtime.restype = ctypes.c_char_p
    used = Path(os.fsdecode(library.runtime())).resolve().parent
    if "MOE_OPS_CUDA_RUNTIME" in os.environ and used != wanted:
        raise RuntimeError(
            f"MOE_OPS_CUDA_RUNTIME is {wanted}, but this process, by its torch, had loaded the runtime in {used}: "
            "use a torch for CPUs"
        )
    return library
