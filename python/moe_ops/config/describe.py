"""What a configuration weighs: parameters, bytes, arithmetic, and the memory a training step keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_ops.config.config import MoEConfig

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float8": 1.0, "int4": 0.5}  # of one parameter, without scales


@dataclass(frozen=True)
class Description:
    """What a configuration weighs.

    Attributes:
        name: of the model.
        layer_total, layer_active: parameters of one MoE layer, and those that one token meets (router, its top_k
            experts, the shared expert).
        total, active: parameters of the model, and those that one token meets: everything outside the routed experts
            and top_k of these. The embedding table counts as active, although a token reads one row of it.
        active_without_embedding: the same without the table, the way some models are advertised.
        flops_per_token: of a forward pass, two for every active parameter that is multiplied (Kaplan et al. 2020,
            arXiv:2001.08361, section 2.1). Attention scores, which grow with the context, are not in it; training takes
            three times as much.
        bytes: of all parameters by dtype, quantisation scales not counted.
        tokens: tokens sent through a layer at once, for what follows.
        saved_bytes: what one MoE layer's experts keep for backward beside the weights, by the dtype of the tokens: x,
            the pre-activation and the plan (moe_mlp's memory law). The router's own activations are not in it.
        moe_layers: layers that each keep this much.
    """

    name: str
    layer_total: int
    layer_active: int
    total: int
    active: int
    active_without_embedding: int
    flops_per_token: int
    bytes: dict[str, int] = field(hash=False)
    tokens: int
    saved_bytes: dict[str, int] = field(hash=False)
    moe_layers: int

    def __str__(self) -> str:
        def gib(size: float) -> str:
            return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"

        weights = ", ".join(f"{gib(size)} {dtype}" for dtype, size in self.bytes.items())
        saved = ", ".join(f"{gib(size)} {dtype}" for dtype, size in self.saved_bytes.items())
        rows = (
            ("parameters", f"{billions(self.total)}, active {billions(self.active)}"),
            ("  without embedding", f"active {billions(self.active_without_embedding)}"),
            (f"one of {self.moe_layers} MoE layers", f"{billions(self.layer_total)}, {billions(self.layer_active)}"),
            ("weights", weights),
            ("forward per token", f"{self.flops_per_token / 1e9:.2f} GFLOP"),
            (f"kept per MoE layer, T={self.tokens}", saved),
        )
        width = max(len(name) for name, _ in rows)
        title = [self.name] if self.name else []
        return "\n".join([*title, *(f"{name:<{width}}  {value}" for name, value in rows)])


def billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{parameters / 1e6:.1f}M"


def mlp_parameters(config: MoEConfig, hidden: int, inner: int) -> int:
    """Of one expert: w_in, w_out and, where there are any, their biases."""
    pre = inner * (2 if config.experts.get("gated", True) else 1)
    biases = pre + hidden if config.experts.get("bias", False) else 0
    return pre * hidden + inner * hidden + biases


def layer_parameters(config: MoEConfig, experts: int) -> int:
    """Of one layer of which this many routed experts are counted."""
    hidden, latent = config.hidden, config.latent or config.hidden
    count = config.num_experts * hidden
    count += config.num_experts * (config.router.get("bias", False) + config.router.get("expert_scale", False))
    count += experts * mlp_parameters(config, latent, config.inner)
    count += 2 * hidden * latent if config.latent else 0
    count += mlp_parameters(config, hidden, config.shared_inner) if config.shared_inner else 0
    return count + (hidden if config.shared_gate else 0)


def saved(config: MoEConfig, tokens: int, size: int) -> int:
    """Bytes that the experts of one layer keep for `tokens` tokens of `size` bytes a value: the memory law of moe_mlp.

    x [T, latent or hidden], the pre-activation [T·K, 2I or I], the route weights [T, K] float32, and the plan: offsets
    [E + 1], row_slot [T·K], slot_row [T, K] and counts [E], all int32. The shared expert is one expert of all tokens.
    """
    wide = 2 if config.experts.get("gated", True) else 1

    def kept(hidden: int, inner: int, experts: int, top_k: int) -> int:
        rows = tokens * top_k
        plan = 4 * (2 * experts + 1 + 2 * rows)
        return tokens * hidden * size + rows * wide * inner * size + 4 * rows + plan

    routed = kept(config.latent or config.hidden, config.inner, config.num_experts, config.top_k)
    if not config.shared_inner:
        return routed
    # Without a projection the shared expert reads the x that is kept already.
    own = config.hidden if config.latent else 0
    return routed + kept(own, config.shared_inner, 1, 1)


def describe(config: MoEConfig, tokens: int) -> Description:
    layer_total = layer_parameters(config, config.num_experts)
    layer_active = layer_parameters(config, config.top_k)
    outside = config.embedding + config.backbone
    total = outside + config.moe_layers * layer_total
    active = outside + config.moe_layers * layer_active
    without = active - config.embedding
    multiplied = active if config.tied else without
    return Description(
        name=config.name,
        layer_total=layer_total,
        layer_active=layer_active,
        total=total,
        active=active,
        active_without_embedding=without,
        flops_per_token=2 * multiplied,
        bytes={dtype: int(total * size) for dtype, size in BYTES.items()},
        tokens=tokens,
        saved_bytes={dtype: saved(config, tokens, size) for dtype, size in (("float32", 4), ("bfloat16", 2))},
        moe_layers=config.moe_layers,
    )
