"""The CUDA library without a GPU: what loads it, what stands in its place, how its operators trace."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

import moe_ops
from moe_ops import _C, cuda, library
from moe_ops.library import OPERATORS
from samples import INNER, SAMPLES, E, H, K, Maker, T

CUDA_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
BUILT = _C.build_facts()
fake_cuda = pytest.mark.skipif(torch.version.cuda is None, reason=f"torch {torch.__version__} is a build without CUDA")
loaded = pytest.mark.skipif(cuda.missing() is not None, reason=f"no CUDA kernels: {cuda.missing()}")


def on_cuda(args, mode):
    """The same arguments as fake CUDA tensors, which need no GPU."""

    def move(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")

    with mode:
        return tree_map_only(torch.Tensor, move, args)


def outputs(result):
    return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def assert_same_kind(ours, expected, device):
    for one, other in zip(outputs(ours), outputs(expected), strict=True):
        assert one.device == torch.device(device)
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@fake_cuda
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_cuda_and_meta_tensors(name):
    """Shapes, dtypes and strides are those that the CPU's kernels give."""
    operator = getattr(torch.ops.moe_ops, name).default
    for args in SAMPLES[name](Maker(torch.device("cpu"), torch.bfloat16)):
        mode = FakeTensorMode()
        fake = on_cuda(args, mode)
        meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
        expected = operator(*args)
        with mode:
            assert_same_kind(operator(*fake), expected, "cuda:0")
        assert_same_kind(operator(*meta), expected, "meta")


@fake_cuda
@pytest.mark.parametrize("name", OPERATORS)
def test_traced_with_fake_cuda_tensors(name):
    operator = getattr(torch.ops.moe_ops, name).default
    for args in SAMPLES[name](Maker(torch.device("cpu"), torch.bfloat16)):
        mode = FakeTensorMode()
        with mode:
            graph = make_fx(lambda *args: operator(*args))(*on_cuda(args, mode))
        assert [node.target for node in graph.graph.nodes if node.target is operator] == [operator]


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        shapes = {"router": (E, H), "w_in": (E, 2 * INNER, H), "w_out": (E, H, INNER)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=torch.bfloat16)))

    def forward(self, x):
        weights, experts = moe_ops.route(x @ self.router.t(), K, renormalize=True)
        rows, plan = moe_ops.dispatch(x, experts, E)
        y = moe_ops.moe_mlp(x, weights, None, self.w_in, self.w_out, plan=plan)
        return y + moe_ops.combine(rows, weights, plan)


@fake_cuda
def test_exported_with_fake_cuda_tensors():
    with FakeTensorMode():
        x = torch.empty(T, H, device="cuda", dtype=torch.bfloat16)
        program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    called = {node.target for node in program.graph.nodes if "moe_ops" in str(node.target)}
    assert {target._schema.name for target in called} == {
        f"moe_ops::{name}" for name in ("route", "plan", "permute", "combine", "moe_mlp")
    }
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    assert output.args[0][0].meta["val"].device == torch.device("cuda:0")


@loaded
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_for_cuda(name):
    registered = torch._C._dispatch_dump(f"moe_ops::{name}").splitlines()
    (kernel,) = (line for line in registered if line.startswith("CUDA:"))
    assert "check.h" in kernel, "a refusal stands in its place"


@loaded
def test_links_the_shared_runtime_and_never_the_driver():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("there is no readelf")
    dynamic = subprocess.check_output([readelf, "-d", library.directory() / cuda.LIBRARY], text=True)
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line]
    assert f"libcudart.so.{BUILT['cuda'].split('.')[0]}" in needed and "libtorch_cuda.so" in needed
    assert not [name for name in needed if name.startswith("libcuda.so")]


@pytest.mark.skipif(cuda.missing() is None, reason="there are CUDA kernels")
@pytest.mark.parametrize("name", OPERATORS)
def test_cuda_tensors_are_refused_without_kernels(name):
    """What a CUDA tensor would be dispatched to, called with a CPU one."""
    args = SAMPLES[name](Maker(torch.device("cpu"), torch.float32))[0]
    with pytest.raises(NotImplementedError) as error:
        getattr(torch.ops.moe_ops, name).default.redispatch(CUDA_KEY, *args)
    text = str(error.value)
    assert text.startswith(f"{name}: got CUDA tensors, but there are no CUDA kernels: {cuda.missing()}. ")
    assert "FORCE_CUDA=1 pip install ." in text


@pytest.mark.parametrize(
    ("architectures", "arch", "expected"),
    [
        ("sm_80", 80, True),
        ("sm_80", 75, False),
        ("sm_80", 86, True),
        ("sm_86", 80, False),
        ("sm_80", 90, False),
        ("compute_80", 75, False),
        ("compute_80", 90, True),
        ("compute_80", 120, True),
        ("sm_90a", 90, True),
        ("compute_90a", 100, False),
        ("sm_90a", 80, False),
        ("sm_100f", 103, True),
        ("compute_100f", 120, False),
        ("sm_80 compute_80 sm_90a", 75, False),
        ("sm_80 compute_80 sm_90a", 89, True),
        ("sm_80 compute_80 sm_90a", 100, True),
        ("none", 90, False),
        ("", 90, False),
    ],
)
def test_which_cards_are_served(architectures, arch, expected):
    assert _C.has_cuda_kernels(architectures, arch) is expected


@pytest.mark.parametrize(
    ("architectures", "arch", "expected"),
    [
        ("sm_80 compute_80 sm_90a", 90, True),
        ("sm_80 compute_80 sm_90a", 86, False),
        ("sm_80 compute_80 sm_90a", 100, False),  # compiles the PTX of sm_80, which has no such wait
        ("sm_80 compute_80", 90, False),
        ("sm_90a compute_80", 90, True),
        ("compute_80 compute_90", 90, True),
        ("compute_80 compute_90", 100, True),
        ("sm_80 compute_80 compute_90a", 100, False),
        ("sm_80 sm_100", 100, True),
        ("none", 90, False),
    ],
)
def test_kernels_start_early_only_where_they_wait(architectures, arch, expected):
    assert _C.cuda_kernels_start_early(architectures, arch) is expected


@pytest.fixture
def package(tmp_path):
    """A copy of the package, whose CUDA library a test may replace."""
    shutil.copytree(Path(moe_ops.__file__).parent, tmp_path / "moe_ops", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(library.directory(), tmp_path / "moe_ops", dirs_exist_ok=True)
    return tmp_path


def run_copy(package, program):
    """Runs a program on the copy in a process of its own: (exit status, output)."""
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def imported(package, setup=""):
    """Imports the copy, routes on the CPU, and tells why there are no CUDA kernels."""
    status, text = run_copy(
        package,
        f"""
import torch
{setup}
import moe_ops
assert moe_ops.__file__.startswith({str(package)!r}), moe_ops.__file__
assert moe_ops.route(torch.zeros(3, 4), 2)[1].tolist() == [[0, 1]] * 3
print(moe_ops.cuda.missing())
""",
    )
    assert status == 0, text
    return text.strip()


built_with_cuda = pytest.mark.skipif(BUILT["cuda"] == "none", reason="built without CUDA")


@built_with_cuda
def test_a_library_that_does_not_load_leaves_the_import_alone(package):
    (package / "moe_ops" / cuda.LIBRARY).write_bytes(b"no library")
    reason = imported(package, f"torch.version.cuda = {BUILT['cuda']!r}")
    assert "does not load under torch" in reason and "file too short" in reason


def test_cpu_build_of_torch_leaves_the_library_alone(package):
    (package / "moe_ops" / cuda.LIBRARY).write_bytes(b"no library")
    assert imported(package, "torch.version.cuda = None") == f"torch {torch.__version__} is a build without CUDA"


@built_with_cuda
def test_another_cuda_major_leaves_the_import_alone(package):
    (package / "moe_ops" / cuda.LIBRARY).touch()
    reason = imported(package, "torch.version.cuda = '9.2'")
    assert reason == f"they were compiled for CUDA {BUILT['cuda']}, torch {torch.__version__} for CUDA 9.2"


def test_no_library_leaves_the_import_alone(package):
    (package / "moe_ops" / cuda.LIBRARY).unlink(missing_ok=True)
    assert imported(package) == "this build of moe_ops has none"


@built_with_cuda
def test_the_diagnosis_tells_of_a_library_that_does_not_load(package):
    (package / "moe_ops" / cuda.LIBRARY).write_bytes(b"no library")
    setup = f"import sys, torch; torch.version.cuda = {BUILT['cuda']!r}"
    status, text = run_copy(package, f"{setup}; from moe_ops.__main__ import main; sys.exit(main())")
    assert status == 1
    assert "PROBLEM: library: FAILED: no CUDA kernels: " in text and "file too short" in text
