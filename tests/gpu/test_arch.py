"""Instructions of sm_90a one by one, as nvcc compiles them: arch/*.cu, which tests/simt runs on its emulator too."""

import ctypes
import os
import re
import subprocess

import library
import pytest

PROGRAMS = {"wgmma": 24, "tma": 20, "barriers": 5, "activation": 28}  # and the checks in each
MAJOR = 75  # cudaDevAttrComputeCapabilityMajor


@pytest.mark.parametrize("program", PROGRAMS)
def test_instructions(program):
    try:
        runtime, folder = library.runtime()
    except library.Unavailable as missing:
        pytest.skip(str(missing))
    major = ctypes.c_int()
    assert runtime.cudaDeviceGetAttribute(ctypes.byref(major), MAJOR, 0) == 0
    if major.value != 9:
        pytest.skip("sm_90a runs on Hopper alone")
    path = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    environment = {**os.environ, "LD_LIBRARY_PATH": path, "LD_PRELOAD": ""}
    done = subprocess.run([library.build_program(program)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(": right$", done.stdout, flags=re.MULTILINE)) == PROGRAMS[program]
