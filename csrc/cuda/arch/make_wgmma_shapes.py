"""Writes wgmma_shapes.cuh: `python make_wgmma_shapes.py > wgmma_shapes.cuh`. An asm statement names every register."""

import textwrap

COLUMNS = (64, 128, 192, 256)
INDENT = 8
TYPES = {"__nv_bfloat16": "bf16", "__half": "f16"}

HEAD = """\
// sm_90: wgmma of every width, written by make_wgmma_shapes.py.
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
{head}
    asm volatile("{{.reg .pred more; setp.ne.b32 more, {accumulate}, 0; wgmma.mma_async"
        ".sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{"
{names}
        "}}, {operands}, more, 1, 1, {major};}}" :
{registers}
        : {inputs});
  }}
"""


def wrapped(words, *, quoted):
    """The words in lines, each a string of its own where they are quoted."""
    lines = textwrap.wrap(", ".join(words), 120 - INDENT - 2 * quoted, break_long_words=False)
    if quoted:
        lines = [f'"{line}"' for line in lines]
    return textwrap.indent("\n".join(lines), " " * INDENT)


def function(n, kind, *, in_registers):
    count = n // 2
    of_a, next_free = (4, count + 4) if in_registers else (1, count + 1)
    names = [f"%{i}" for i in range(count)]
    a = [f"%{count + i}" for i in range(of_a)]
    flags = next_free + 2
    a_type = "const uint32_t (&a)[4]" if in_registers else "uint64_t a"
    template = "template <bool b_across>" if in_registers else "template <bool a_across, bool b_across>"
    inputs = [f'"r"(a[{i}])' for i in range(4)] if in_registers else ['"l"(a)']
    inputs += ['"l"(b)', '"r"(int(accumulate))']
    inputs += ['"n"(int(b_across))'] if in_registers else ['"n"(int(a_across))', '"n"(int(b_across))']
    return FUNCTION.format(
        head=f"  {template} static __device__ __forceinline__\n"
        f"  void multiply(float (&d)[{count}], {a_type}, uint64_t b, bool accumulate) {{",
        accumulate=f"%{next_free + 1}",
        n=n,
        kind=kind,
        names=wrapped(names, quoted=True),
        operands=("{" + ", ".join(a) + "}" if in_registers else a[0]) + f", %{next_free}",
        major=f"%{flags}" if in_registers else f"%{flags}, %{flags + 1}",
        registers=wrapped([f'"+f"(d[{i}])' for i in range(count)], quoted=False),
        inputs=", ".join(inputs),
    )


def main():
    print(HEAD)
    for cpp, kind in TYPES.items():
        for n in COLUMNS:
            print(f"template <>\nstruct Wgmma<{cpp}, {n}> {{")
            print(function(n, kind, in_registers=False))
            print(function(n, kind, in_registers=True) + "};\n")
    print("}  // namespace moe::arch")


if __name__ == "__main__":
    main()
