"""Writes wgmma_shapes.cuh: `python make_wgmma_shapes.py > wgmma_shapes.cuh`. An asm statement names every register."""

import textwrap

COLUMNS = (64, 128, 256)
INDENT = 8
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}

HEAD = """\
// sm_90: wgmma of the widths that are used, written by make_wgmma_shapes.py.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-multiply-and-accumulate-instruction-wgmma-mma-async
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// clang-format off
namespace moe::arch {

// d [64, n] (+)= a [64, 16] . b [n, 16]^T, in float32; the first product of a sum does not accumulate. Of the four
// warps w holds rows 16 w..: lane l in d[4 i + j] row l / 4 + 8 (j / 2), column 8 i + 2 (l % 4) + j % 2.
// a_across, b_across: the operand's rows in shared memory lie along M or N and not along K.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#wgmma-64n16-d
template <class T, int n>
struct Wgmma;
"""

FUNCTION = """\
  template <bool a_across, bool b_across> static __device__ __forceinline__
  void multiply(float (&d)[{count}], uint64_t a, uint64_t b, bool accumulate) {{
    asm volatile("{{.reg .pred more; setp.ne.b32 more, {accumulate}, 0; wgmma.mma_async"
        ".sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{"
{names}
        "}}, {operands}, more, 1, 1, {major};}}" :
{registers}
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(a_across)), "n"(int(b_across)));
  }}
"""


def wrapped(words, *, quoted):
    """The words in lines, each a string of its own where they are quoted."""
    lines = textwrap.wrap(", ".join(words), 120 - INDENT - 2 * quoted, break_long_words=False)
    if quoted:
        lines = [f'"{line}"' for line in lines]
    return textwrap.indent("\n".join(lines), " " * INDENT)


def function(n, kind):
    count = n // 2
    a, b, accumulate, a_across, b_across = (f"%{count + i}" for i in range(5))
    return FUNCTION.format(
        count=count,
        accumulate=accumulate,
        n=n,
        kind=kind,
        names=wrapped([f"%{i}" for i in range(count)], quoted=True),
        operands=f"{a}, {b}",
        major=f"{a_across}, {b_across}",
        registers=wrapped([f'"+f"(d[{i}])' for i in range(count)], quoted=False),
    )


def main():
    print(HEAD)
    for cpp, kind in TYPES.items():
        for n in COLUMNS:
            print(f"template <>\nstruct Wgmma<{cpp}, {n}> {{")
            print(function(n, kind) + "};\n")
    print("}  // namespace moe::arch")


if __name__ == "__main__":
    main()
