"""The standing set of shapes: layers of known models, slices of them that fit a laptop, and odd ones."""

from __future__ import annotations

from dataclasses import dataclass

from moe_ops import MoEConfig


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    activation: str = "silu"
    gated: bool = True

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    def __str__(self) -> str:
        sizes = f"T{self.tokens} H{self.hidden} I{self.inner} E{self.experts} K{self.top_k}"
        return f"{self.name} {sizes}" if self.name else sizes


def of(preset: str, tokens: int, name: str = "") -> Shape:
    """The layer of a preset, met by this many tokens."""
    config = MoEConfig.preset(preset)
    activation, gated = config.experts.get("activation", "silu"), config.experts.get("gated", True)
    sizes = (config.hidden, config.inner, config.num_experts, config.top_k)
    return Shape(name or preset, tokens, *sizes, activation, gated)


STANDING = {
    shape.name: shape
    for shape in (
        # Small enough for --quick: few wide experts, many narrow ones.
        of("quick-wide", 256),
        of("quick-fine", 256),
        of("quick-wide", 4, "quick-decode"),
        of("one-token", 1),
        # Slices that keep a model's number of experts, or its widths, at the size of a laptop.
        of("mixtral-slice", 512),
        of("mixtral-slice", 16, "mixtral-decode"),
        of("qwen3-slice", 512),
        of("qwen3-slice", 16, "qwen3-decode"),
        of("qwen3-30b", 512, "qwen3-512"),
        of("deepseek-slice", 512),
        of("switch-base-8", 1024),
        of("odd", 333),
        # Layers as they are.
        of("mixtral-8x7b", 4096),
        of("qwen3-30b", 4096),
        of("qwen3-30b", 16, "qwen3-30b-decode"),
        of("qwen3-next", 4096),
        of("deepseek-v3-ep8", 4096),
        of("gpt-oss-20b", 4096),
        of("olmoe", 4096),
        # Batches for a GPU: training (SonicMoE's 7B and 30B), prefill, decoding.
        Shape("sonic-7b", 24576, 1536, 256, 128, 8),
        Shape("sonic-30b", 32768, 4096, 1024, 64, 4),
        of("qwen3-30b", 32768, "qwen3-30b-train"),
        of("mixtral-8x7b", 8192, "mixtral-8x7b-prefill"),
        of("gpt-oss-20b", 8192, "gpt-oss-20b-prefill"),
        of("mixtral-8x7b", 16, "mixtral-8x7b-decode"),
    )
}

# What each bench runs when no --shape is given: its own list, and the one of --quick.
DEFAULT = {
    "route": ("mixtral-8x7b", "qwen3-30b", "qwen3-next", "qwen3-30b-decode"),
    "plan": ("mixtral-8x7b", "qwen3-30b", "qwen3-next", "qwen3-30b-decode"),
    "permute": ("mixtral-8x7b", "qwen3-30b", "odd"),
    "combine": ("mixtral-8x7b", "qwen3-30b", "odd"),
    "grouped_gemm": ("mixtral-slice", "mixtral-decode", "qwen3-512", "qwen3-30b-decode", "deepseek-slice", "odd"),
    "moe": ("one-token", "mixtral-slice", "mixtral-decode", "qwen3-512", "deepseek-slice", "switch-base-8", "odd"),
    "transformers": ("mixtral-slice", "mixtral-decode", "qwen3-slice", "qwen3-decode"),
}
CUDA = {
    "route": ("qwen3-30b-train", "qwen3-next", "mixtral-8x7b-prefill"),
    "plan": ("qwen3-30b-train", "qwen3-next"),
    "permute": ("qwen3-30b-train", "mixtral-8x7b-prefill"),
    "combine": ("qwen3-30b-train", "mixtral-8x7b-prefill"),
    "grouped_gemm": ("sonic-7b", "deepseek-v3-ep8", "gpt-oss-20b-prefill", "mixtral-8x7b-decode"),
    "moe": (
        "qwen3-30b-train",
        "sonic-30b",
        "mixtral-8x7b-prefill",
        "deepseek-v3-ep8",
        "gpt-oss-20b-prefill",
        "olmoe",
        "qwen3-next",
        "qwen3-30b-decode",
        "mixtral-8x7b-decode",
        "odd",
    ),
}
QUICK = {
    "route": ("qwen3-30b",),
    "plan": ("qwen3-30b",),
    "permute": ("qwen3-slice",),
    "combine": ("qwen3-slice",),
    "grouped_gemm": ("quick-wide", "quick-fine"),
    "moe": ("quick-wide", "quick-fine"),
    "transformers": ("quick-wide", "quick-decode"),
}


def parse(text: str) -> Shape:
    """A name of the standing set, or five sizes: tokens,hidden,inner,experts,top_k."""
    if text in STANDING:
        return STANDING[text]
    sizes = text.split(",")
    if len(sizes) != 5 or not all(size.isdigit() for size in sizes):
        raise ValueError(
            f"shape: expected T,H,I,E,K (five numbers) or one of {', '.join(STANDING)}; got {text!r}",
        )
    return Shape("", *(int(size) for size in sizes))
