"""The emulator itself: its instructions against scalar loops, and kernels with planted faults, which it catches."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ARCH = ROOT / "tests/gpu/arch"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
SEEDS = (0, 1, 2)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to compile small programs with")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compiles a program for the emulator and gives its path."""
    folder = tmp_path_factory.mktemp("simt")

    def build(name, *options):
        program = folder / "".join([name, *options])
        if not program.exists():
            command = [COMPILER, "-std=c++20", "-O1", "-rdynamic", *options, f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
            source = next(path for path in (HERE / f"programs/{name}.cpp", ARCH / f"{name}.cu") if path.exists())
            command += ["-x", "c++", source, ROOT / "csrc/cuda/launch/tensor_map.cu"]
            subprocess.run([*command, "-o", program], check=True)
        return program

    return build


def run(program, *arguments, seed=0):
    """(exit status, output) of a program."""
    environment = {**os.environ, "MOE_OPS_SIMT_SEED": str(seed), "LD_PRELOAD": ""}
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("seed", SEEDS)
def test_instructions(seed, compiled):
    status, text = run(compiled("instructions"), seed=seed)
    assert status == 0, text
    assert len(re.findall(": right", text)) == 12


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("program", ["wgmma", "tma", "barriers", "activation"])
def test_instructions_of_sm_90(program, seed, compiled):
    status, text = run(compiled(program), seed=seed)
    assert status == 0 and ": right" in text, text


# What the emulator says of each fault; "wrong" is what a comparison of results says.
FAULTS = {
    "missing_barrier": "wrong: out",
    "missing_warp_barrier": "wrong: out",
    "missing_second_barrier": "wrong: out",
    "missing_wait": "wrong: out",
    "missing_commit": "wrong: out",
    "unwritten_output": "wrong: out",
    "wrong_swizzle": "wrong: d",
    "store_out_of_bounds": r"a store out of bounds: byte 512 of scratch of 512 bytes was written",
    "shared_out_of_bounds": r"a store out of bounds: byte 512 of shared memory of 512 bytes was written",
    "vector_out_of_bounds": r"a load of 16 bytes out of bounds: at byte 512 of scratch .*thread \(32, 0, 0\)",
    "unaligned_vector": r"a load of 16 bytes at 0x\w+ is not aligned to 16 .*thread \(0, 0, 0\)",
    "too_little_shared_memory": r"shared memory of 1024 bytes is read, 512 were launched",
    "divergent_barrier": r"divergent barrier: sync_block, while thread \(\d+, 0, 0\) waits in sync_block at .*faults",
    "divergent_shuffle": r"divergent barrier: shuffle_\w+ with lanes 0xffffffff, while .* waits in shuffle_",
    "deadlock": r"deadlock in block \(0, 0, 0\): thread \(0, 0, 0\) waits in sync_block .*64 of 128 threads have ret",
    "warp_deadlock": r"deadlock in block \(0, 0, 0\): .* waits in sync_warp at .* for lanes 0x80000000",
    "endless_wait": r"deadlock: every block .* spins, block \(0, 0, 0\): .* waits in wait_until at .*faults.cpp",
    "absent_lane": r"a shuffle reads lane 16, which takes no part at .*faults.cpp:\d+, block \(0, 0, 0\), thread",
}


UNFENCED = r"reads byte \d+ of shared memory, which a thread wrote .*and no fence_async_proxy followed at .*faults_sm90"
FAULTS_OF_SM_90 = {
    "store_before_wgmma": "wgmma's a " + UNFENCED,
    "copy_before_wgmma": "wgmma's a " + UNFENCED,
    "store_before_tma_store": "tma_store " + UNFENCED,
    "fence_too_early": "tma_store " + UNFENCED,
    "slot_released_early": r"an operand of the wgmma at .* was overwritten before its wgmma_wait",
    "copies_over_a_running_wgmma": r"an operand of the wgmma at .* was overwritten before its wgmma_wait",
    "accumulators_read_early": "wrong: d",
    "missing_wgmma_fence": "wgmma without a wgmma_fence before it",
    "missing_wait_for_tma": r"an operand of the wgmma at .* was overwritten|wrong: d",
    "missing_wait_for_copies": f"wgmma's a {UNFENCED}|an operand of the wgmma at .* was overwritten|wrong: d",
    "wrong_bytes": r"deadlock in block .* waits in Barrier::wait at .*faults_sm90",
    "missing_barrier_fence": "tma_load with a barrier whose init no fence_barrier_init followed",
    "too_many_arrivals": "more arrivals at a barrier than it counts",
    "overwritten_while_stored": "shared memory was written while a tma_store may still read it",
    "store_not_waited_for": "a thread ends whose tma_store may still read shared memory",
    "wgmma_not_waited_for": "a thread ends before wgmma_wait",
    "warps_disagree": "the warps of a warpgroup have asked for different wgmmas",
    "own_consumers_only": r"an operand of the wgmma at .* was overwritten before its wgmma_wait",
    "ends_before_its_neighbour": "an arrival at the barrier of a block that has ended",
    "idle_block_ends": "tma_load to a block that has ended|a barrier that something else was written over",
    "missing_named_barrier": "wrong: out",
    "wrong_count_of_threads": "a barrier of 64 threads, where others wait for 32|deadlock .* waits in a named barrier",
    "too_few_registers": "deadlock in block .* waits in take_registers",
    "block_ends_early": "an arrival at the barrier of a block that has ended|wrong: out",
    "wrong_parity": "deadlock in block .* waits in Barrier::wait",
}


UNWAITED = "a thread of a grid that started early ends without wait_for_previous_grid"
FAULTS_OF_GRIDS = {
    "read_before_wait": "wrong: out",
    "write_before_wait": "wrong: out",
    "middle_never_waits": UNWAITED,
    "some_threads_wait": UNWAITED,
}
PLANTED = {"faults": FAULTS, "faults_sm90": FAULTS_OF_SM_90, "faults_grids": FAULTS_OF_GRIDS}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("program, fault", [(program, fault) for program in PLANTED for fault in PLANTED[program]])
def test_fault_is_caught(program, fault, seed, compiled):
    kernels, expected = compiled(program), PLANTED[program][fault]
    assert run(kernels, fault, "mended", seed=seed) == (0, "right\n")
    status, text = run(kernels, fault, seed=seed)
    assert status == 1 and re.search(expected, text), text
    if program == "faults" and not expected.startswith("wrong"):
        assert f"::{fault}<false>" in text and f"(seed {seed}, launch 0)" in text


def test_order_of_a_float_sum_shows(compiled):
    program = compiled("faults")
    unordered = {run(program, "unordered_sum", seed=seed)[1] for seed in SEEDS}
    assert len(unordered) == len(SEEDS)
    assert len({run(program, "unordered_sum", "mended", seed=seed)[1] for seed in SEEDS}) == 1


@pytest.mark.parametrize("fault", ["store_out_of_bounds", "shared_out_of_bounds"])
def test_address_sanitizer_sees_plain_stores(fault, compiled):
    program = compiled("faults", "-fsanitize=address,undefined")
    assert run(program, fault, "mended") == (0, "right\n")
    status, text = run(program, fault)
    assert status == 1 and "AddressSanitizer: use-after-poison" in text and fault in text
