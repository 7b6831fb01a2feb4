"""One suite for every device: `pytest --device cpu|simt|cuda`, one process per device; `--long` adds the big cases."""

import ctypes
import os

import pytest
import torch

LIBRARIES = {"cpu": "libmoe_ops_cpu.so", "simt": "libmoe_ops_simt.so", "cuda": "libmoe_ops_cuda.so"}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=list(LIBRARIES), help="the kernels under test")
    parser.addoption("--long", action="store_true", help="also run the tests that need minutes or many GiB")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: needs minutes or many GiB of memory; run with --long")
    config.addinivalue_line("markers", "long_emulated: needs minutes on the emulator; run with --long there")
    config.addinivalue_line("markers", "long_on_card: takes many GiB of a GPU's memory; run with --long there")
    config.addinivalue_line("markers", "float64: needs float64, which is supported on the CPU only")
    config.addinivalue_line("markers", "on_device: set on every test whose tensors live on the device under test")
    wanted = config.getoption("--device")
    os.environ["MOE_OPS_DEVICE"] = wanted  # before moe_ops is imported, here and in subprocesses
    if wanted != "cpu":
        try:
            from moe_ops.library import directory
        except ImportError as error:
            raise pytest.UsageError(f"--device {wanted}: {error}") from None
        if not (directory() / LIBRARIES[wanted]).is_file():
            raise pytest.UsageError(f"--device {wanted}: {LIBRARIES[wanted]} was not built")
    if wanted == "cuda":
        from moe_ops import cuda

        reason = cuda.missing() or ("" if torch.cuda.is_available() else "torch sees no GPU")
        if reason:
            raise pytest.UsageError(f"--device cuda: {reason}")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")
    if not config.getoption("--long"):
        skip = pytest.mark.skip(reason="long; run with --long")
        long = {"long", {"simt": "long_emulated", "cuda": "long_on_card"}.get(config.getoption("--device"), "long")}
        for item in items:
            if not long.isdisjoint(item.keywords):
                item.add_marker(skip)
    if config.getoption("--device") != "cpu":
        skip = pytest.mark.skip(reason="float64 is supported on the CPU only")
        for item in items:
            values = item.callspec.params.values() if hasattr(item, "callspec") else ()
            if "float64" in item.keywords or any(value is torch.float64 for value in values):
                item.add_marker(skip)


def pytest_generate_tests(metafunc):
    if "instruction_set" in metafunc.fixturenames:
        metafunc.parametrize("instruction_set", _instruction_sets(metafunc.config), indirect=True)


def _instruction_sets(config):
    if config.getoption("--device") != "cpu":
        return ["device"]
    from moe_ops import _C

    return _C.instruction_sets()


@pytest.fixture
def instruction_set(request):
    """The test runs once per instruction set of this processor."""
    if request.param == "device":
        yield request.param
        return
    from moe_ops import _C

    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)


@pytest.fixture
def device(pytestconfig):
    """Where the tensors under test live; the emulated kernels take CPU tensors."""
    return torch.device("cuda" if pytestconfig.getoption("--device") == "cuda" else "cpu")


@pytest.fixture
def threads():
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def switches():
    """Puts batch invariance and torch's TF32 switch back after a test that changes them."""
    from moe_ops import set_batch_invariant

    yield
    set_batch_invariant(False)
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.fixture
def batch_invariant(switches):
    """Batch invariance: plain weights and packed ones sum in one order, for any number of rows."""
    from moe_ops import set_batch_invariant

    set_batch_invariant(True)


@pytest.fixture
def launches(pytestconfig):
    """Gives how many kernels the process has started, on the emulator, which counts them."""
    return _count_of_emulator(pytestconfig, "moe_ops_simt_launches")


@pytest.fixture
def early_launches(pytestconfig):
    """Gives how many of them may have started before the kernel ahead had ended."""
    return _count_of_emulator(pytestconfig, "moe_ops_simt_early_launches")


@pytest.fixture
def wgmmas(pytestconfig):
    """Gives how many wgmmas the warps of the process have started, on the emulator, which counts them."""
    return _count_of_emulator(pytestconfig, "moe_ops_simt_wgmmas")


@pytest.fixture
def multicasts(pytestconfig):
    """Gives how many boxes of TMA the process has sent to several blocks, on the emulator, which counts them."""
    return _count_of_emulator(pytestconfig, "moe_ops_simt_multicasts")


def _count_of_emulator(pytestconfig, name):
    if pytestconfig.getoption("--device") != "simt":
        pytest.skip("only the emulator counts kernels")
    from moe_ops.library import directory

    count = getattr(ctypes.CDLL(str(directory() / LIBRARIES["simt"])), name)
    count.restype = ctypes.c_uint64
    return count
