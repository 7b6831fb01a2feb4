"""What a stage must at least compute and move, and the time the machine's measured roofs allow for it.

Bytes are those of a perfect run: every operand is read once, every result written once, and nothing is kept in a cache
from an earlier launch. A variant that moves more is not excused: its fraction of the roof is lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import device
from shapes import Shape

TYPES = ("float32", "float64", "float16", "bfloat16")
INDEX = 4  # bytes of an int32
FLOAT = 4  # bytes of a route weight


@dataclass(frozen=True)
class Work:
    flops: float = 0
    read: float = 0  # bytes
    written: float = 0  # bytes

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Roofs:
    """FLOP/s by dtype, bytes/s of reading, bytes/s of copying (read and written bytes counted)."""

    arithmetic: dict[str, float]
    read: float
    copy: float

    @classmethod
    def measure(cls, cache_bytes: int, seconds: float = 0.2) -> Roofs:
        """On torch's threads, with the instruction set that moe_ops uses; on a GPU, by torch's own kernels."""
        if device.on_cuda():
            found = device.measure_roofs()
            return cls({name: found[name] for name in TYPES}, found["read"], found["copy"])
        from moe_ops import _C

        found = _C.roofs(bytes=max(4 * cache_bytes, 128 << 20), seconds=seconds)
        # Without a dot product of its own a 16-bit type is computed in float32: float32's peak is its roof.
        arithmetic = {
            "float32": found["float32"],
            "float64": found["float64"],
            "float16": found["float32"],
            "bfloat16": found["bfloat16"] or found["float32"],
        }
        return cls(arithmetic, found["read"], found["copy"])

    def higher(self, other: Roofs) -> Roofs:
        """The better of two measurements, roof by roof: a disturbed one is too low, none is too high."""
        arithmetic = {dtype: max(peak, other.arithmetic[dtype]) for dtype, peak in self.arithmetic.items()}
        return Roofs(arithmetic, max(self.read, other.read), max(self.copy, other.copy))

    def arithmetic_seconds(self, work: Work, dtype: str) -> float:
        return work.flops / self.arithmetic[dtype] if work.flops else 0.0

    def memory_seconds(self, work: Work) -> float:
        """What is written is copied, as far as there is something to read for it; what else is read is read."""
        copied = min(work.read, work.written)
        return (2 * copied + (work.written - copied)) / self.copy + (work.read - copied) / self.read

    def seconds(self, work: Work, dtype: str) -> float:
        """The shortest time for the work: the tighter of the two roofs."""
        return max(self.arithmetic_seconds(work, dtype), self.memory_seconds(work))

    def rate(self, work: Work, dtype: str, seconds: float) -> str:
        """What a time means in units of the roof that binds."""
        if self.arithmetic_seconds(work, dtype) >= self.memory_seconds(work):
            return f"{work.flops / seconds / 1e9:.3g} GFLOP/s"
        return f"{(work.read + work.written) / seconds / 1e9:.3g} GB/s"

    def describe(self) -> str:
        peaks = ", ".join(f"{dtype} {self.arithmetic[dtype] / 1e9:.0f}" for dtype in ("float32", "float64", "bfloat16"))
        note = ""
        if self.arithmetic["bfloat16"] == self.arithmetic["float32"]:
            note = " (bfloat16 is computed in float32: no dot product in this instruction set)"
        memory = f"read {self.read / 1e9:.1f} GB/s, copy {self.copy / 1e9:.1f} GB/s"
        return f"roofs: multiply-add {peaks} GFLOP/s{note}; {memory}"


def route(s: Shape, size: int) -> Work:
    return Work(read=s.tokens * s.experts * size, written=s.rows * (FLOAT + INDEX))


def route_backward(s: Shape, size: int) -> Work:
    logits = s.tokens * s.experts * size
    return Work(read=logits + s.rows * (FLOAT + INDEX), written=logits)


def plan(s: Shape) -> Work:
    return Work(read=s.rows * INDEX, written=(2 * s.rows + 2 * s.experts + 1) * INDEX)


def permute(s: Shape, size: int) -> Work:
    return Work(read=s.tokens * s.hidden * size + s.rows * INDEX, written=s.rows * s.hidden * size)


def permute_backward(s: Shape, size: int) -> Work:
    """A combine without weights."""
    read = s.rows * (s.hidden * size + INDEX)
    return Work(s.rows * s.hidden, read, s.tokens * s.hidden * size)


def combine(s: Shape, size: int) -> Work:
    read = s.rows * (s.hidden * size + FLOAT + INDEX)
    return Work(2 * s.rows * s.hidden, read, s.tokens * s.hidden * size)


def combine_backward(s: Shape, size: int) -> Work:
    """The rows' gradient (a multiplication) and the weights' (a dot product)."""
    rows, tokens = s.rows * s.hidden * size, s.tokens * s.hidden * size
    return Work(3 * s.rows * s.hidden, tokens + rows + s.rows * (FLOAT + INDEX), rows + s.rows * FLOAT)


def grouped_gemm(s: Shape, size: int, n: int, k: int, active: int) -> Work:
    """rows [R, k] by the weights [n, k] of the experts that have rows."""
    return Work(2.0 * s.rows * n * k, (s.rows * k + active * n * k) * size, s.rows * n * size)


def grouped_gemm_input_grad(s: Shape, size: int, n: int, k: int, active: int) -> Work:
    """The gradient of the rows [R, k]: the same product with n and k exchanged."""
    return grouped_gemm(s, size, k, n, active)


def grouped_gemm_weight_grad(s: Shape, size: int, n: int, k: int) -> Work:
    """The gradients [n, k] of every expert's weights, zeros included."""
    return Work(2.0 * s.rows * n * k, s.rows * (n + k) * size, s.experts * n * k * size)


def pre_width(s: Shape) -> int:
    return 2 * s.inner if s.gated else s.inner


def weights_of_expert(s: Shape) -> int:
    return (pre_width(s) + s.inner) * s.hidden


def moe_forward(s: Shape, size: int, active: int) -> Work:
    """Router (float32), experts with rows, nothing in between stored."""
    flops = 2.0 * s.tokens * s.hidden * s.experts + 2.0 * s.rows * weights_of_expert(s)
    read = (s.tokens * s.hidden + active * weights_of_expert(s)) * size + s.experts * s.hidden * FLOAT
    return Work(flops, read, s.tokens * s.hidden * size)


def moe_training(s: Shape, size: int, active: int) -> Work:
    """Forward and backward; between them the pre-activation [R, 2I or I] is kept."""
    forward = moe_forward(s, size, active)
    kept = Work(written=s.rows * pre_width(s) * size)
    read = s.rows * pre_width(s) + 2 * s.tokens * s.hidden + active * weights_of_expert(s)  # pre, x and grad_y, weights
    written = s.tokens * s.hidden + s.experts * weights_of_expert(s)
    router = s.experts * s.hidden * FLOAT
    return forward + kept + Work(2 * forward.flops, read * size + router, written * size + router)


def dense(s: Shape, size: int, training: bool = False) -> Work:
    """A feed-forward layer as wide as the experts one token sees: the same FLOPs, without the router."""
    weights = s.top_k * weights_of_expert(s)
    flops = 2.0 * s.tokens * weights
    tokens = s.tokens * s.hidden
    forward = Work(flops, (tokens + weights) * size, tokens * size)
    if not training:
        return forward
    kept = s.rows * pre_width(s)
    return forward + Work(2 * flops, (kept + 2 * tokens + weights) * size, (kept + tokens + weights) * size)
