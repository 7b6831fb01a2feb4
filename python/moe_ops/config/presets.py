"""Published MoE models, each with the source of its numbers. What could not be sourced is left out."""

from __future__ import annotations

from typing import Any

from moe_ops.config.backbone import gated_delta_net, gqa, mamba, mla, mlp
from moe_ops.config.config import MoEConfig
from moe_ops.config.not_moe import NOT_MOE

PRESETS: dict[str, MoEConfig] = {}

DEEPSEEK_ROUTER = {"score": "sigmoid", "correction_bias": True, "renormalize": True}
RENORMALIZED = {"renormalize": True}
GPT_OSS_EXPERTS = {
    "bias": True, "layout": "interleaved", "alpha": 1.702, "limit": 7.0, "up_offset": 1.0,
}  # fmt: skip


def get(name: Any) -> MoEConfig:
    if not isinstance(name, str):
        raise TypeError(f"MoEConfig.preset: name must be a str, got {type(name).__name__}")
    key = name.strip().lower().replace(" ", "-").replace("_", "-")
    key = ALIASES.get(key, key)
    if key in NOT_MOE:
        raise ValueError(f"MoEConfig.preset: {NOT_MOE[key]}")
    if key not in PRESETS:
        raise ValueError(f"MoEConfig.preset: name must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[key].replace()  # a copy: its dicts are the caller's


def model(
    name: str, *, vocab: int, blocks: int, attention: int, dense: int = 0, norms: int | None = None, extra: int = 0,
    tied: bool = False, moe_layers: int | None = None, **layer: Any,
) -> None:  # fmt: skip
    """Enters a model of `blocks` transformer blocks; attention and dense are the parameters of all of them together.

    norms: by default two of hidden in every block and one at the end. extra: what stands nowhere else.
    """
    hidden: int = layer["hidden"]
    norms = (2 * blocks + 1) * hidden if norms is None else norms
    head = 0 if tied else vocab * hidden
    PRESETS[name] = MoEConfig(
        name=name,
        embedding=vocab * hidden,
        tied=tied,
        backbone=attention + dense + norms + extra + head,
        moe_layers=blocks if moe_layers is None else moe_layers,
        **layer,
    )


def switch(
    name: str, layers: int, heads: int, *, hidden: int, inner: int, num_experts: int, gated: bool, activation: str,
    tied: bool, source: str,
) -> None:  # fmt: skip
    """An encoder and a decoder of T5's form, every other feed-forward layer sparse."""
    self_attention = 4 * hidden * heads * 64
    model(
        name, vocab=32128, blocks=2 * layers, moe_layers=layers, hidden=hidden, inner=inner, num_experts=num_experts,
        top_k=1, tied=tied, attention=3 * layers * self_attention, dense=layers * mlp(hidden, inner, gated=gated),
        norms=(2 * layers + 1 + 3 * layers + 1) * hidden, extra=2 * 32 * heads,  # relative positions: 32 buckets
        router_kind="switch", router={"jitter": 0.01}, capacity_factor=1.25,
        experts={"activation": activation, "gated": gated},
        source=f"{source}; jitter (the t5x models have none): Fedus et al. 2022 (arXiv:2101.03961), appendix C",
    )  # fmt: skip


switch(
    "switch-base-8", 12, 12, hidden=768, inner=3072, num_experts=8, gated=False, activation="relu",
    tied=True,
    source="google/flaxformer, t5x/configs/moe/models/switch_base.gin, with the 8 experts of google/switch-base-8",
)  # fmt: skip
switch(
    "switch-base-128", 12, 12, hidden=768, inner=3072, num_experts=128, gated=False, activation="relu",
    tied=True,
    source="google/flaxformer, t5x/configs/moe/models/switch_base.gin, with the 128 experts of t5x's checkpoint "
    "moe/switch_classic/base/e128 (docs/models.md)",
)  # fmt: skip
switch(
    "switch-xxl", 24, 64, hidden=4096, inner=10240, num_experts=128, gated=True, activation="gelu_tanh",
    tied=False,
    source="google/flaxformer, t5x/configs/moe/models/switch_xxl.gin (its 128 experts give the 395B of the paper's "
    "table 9)",
)  # fmt: skip
model(
    "mixtral-8x7b", hidden=4096, inner=14336, num_experts=8, top_k=2, router=RENORMALIZED,
    vocab=32000, blocks=32, attention=32 * gqa(4096, 32, 8, 128),
    source="Jiang et al. 2024 (arXiv:2401.04088), table 1; config.json of mistralai/Mixtral-8x7B-v0.1",
)  # fmt: skip
model(
    "mixtral-8x22b", hidden=6144, inner=16384, num_experts=8, top_k=2, router=RENORMALIZED,
    vocab=32000, blocks=56, attention=56 * gqa(6144, 48, 8, 128),
    source="config.json of mistral-community/Mixtral-8x22B-v0.1",
)  # fmt: skip
model(
    "dbrx", hidden=6144, inner=10752, num_experts=16, top_k=4, router={"renormalize": "pnorm", "p": 1.0},
    vocab=100352, blocks=40, attention=40 * gqa(6144, 48, 8, 128),
    source="config.json of databricks/dbrx-instruct",
)  # fmt: skip
model(
    "deepseek-v2-lite", hidden=2048, inner=1408, num_experts=64, top_k=6, shared_inner=2 * 1408,
    vocab=102400, blocks=27, moe_layers=26, attention=27 * mla(2048, 16, None, 512), dense=mlp(2048, 10944),
    source="DeepSeek-AI 2024 (arXiv:2405.04434), appendix B; config.json of deepseek-ai/DeepSeek-V2-Lite",
)  # fmt: skip
model(
    "deepseek-v2", hidden=5120, inner=1536, num_experts=160, top_k=6, shared_inner=2 * 1536,
    router={"groups": (8, 3), "group_score": "max", "group_mask": "zero", "scale": 16.0},
    vocab=102400, blocks=60, moe_layers=59, attention=60 * mla(5120, 128, 1536, 512), dense=mlp(5120, 12288),
    source="DeepSeek-AI 2024 (arXiv:2405.04434), section 3.1.2; config.json of deepseek-ai/DeepSeek-V2",
)  # fmt: skip
model(
    "deepseek-v3", hidden=7168, inner=2048, num_experts=256, top_k=8, shared_inner=2048,
    router=DEEPSEEK_ROUTER | {"groups": (8, 4), "scale": 2.5},
    vocab=129280, blocks=61, moe_layers=58, attention=61 * mla(7168, 128, 1536, 512), dense=3 * mlp(7168, 18432),
    source="DeepSeek-AI 2024 (arXiv:2412.19437), section 4.2; config.json of deepseek-ai/DeepSeek-V3 (without its "
    "layer for multi-token prediction)",
)  # fmt: skip
model(
    "kimi-k2", hidden=7168, inner=2048, num_experts=384, top_k=8, shared_inner=2048,
    router=DEEPSEEK_ROUTER | {"scale": 2.827},
    vocab=163840, blocks=61, moe_layers=60, attention=61 * mla(7168, 64, 1536, 512), dense=mlp(7168, 18432),
    source="README of MoonshotAI/Kimi-K2, model summary; config.json of moonshotai/Kimi-K2-Instruct",
)  # fmt: skip
model(
    "qwen1.5-moe", hidden=2048, inner=1408, num_experts=60, top_k=4, shared_inner=5632, shared_gate=True,
    vocab=151936, blocks=24, attention=24 * gqa(2048, 16, 16, 128, qkv_bias=True),
    source="config.json of Qwen/Qwen1.5-MoE-A2.7B",
)  # fmt: skip
model(
    "qwen2-57b", hidden=3584, inner=2560, num_experts=64, top_k=8, shared_inner=20480, shared_gate=True,
    vocab=151936, blocks=28, attention=28 * gqa(3584, 28, 4, 128, qkv_bias=True),
    source="Qwen team 2024 (arXiv:2407.10671), table 1; config.json of Qwen/Qwen2-57B-A14B",
)  # fmt: skip
model(
    "qwen3-30b", hidden=2048, inner=768, num_experts=128, top_k=8, router=RENORMALIZED,
    vocab=151936, blocks=48, attention=48 * gqa(2048, 32, 4, 128, qk_norm=True),
    source="Qwen team 2025 (arXiv:2505.09388), table 2; config.json of Qwen/Qwen3-30B-A3B",
)  # fmt: skip
model(
    "qwen3-235b", hidden=4096, inner=1536, num_experts=128, top_k=8, router=RENORMALIZED,
    vocab=151936, blocks=94, attention=94 * gqa(4096, 64, 4, 128, qk_norm=True),
    source="Qwen team 2025 (arXiv:2505.09388), table 2; config.json of Qwen/Qwen3-235B-A22B",
)  # fmt: skip
model(
    "qwen3-next", hidden=2048, inner=512, num_experts=512, top_k=10, router=RENORMALIZED, shared_inner=512,
    shared_gate=True, vocab=151936, blocks=48,
    attention=12 * gqa(2048, 16, 2, 256, qk_norm=True, gate=True) + 36 * gated_delta_net(2048, 16, 32, 128, 128, 4),
    source="Qwen3NextConfig of transformers 5.23, the configuration of Qwen/Qwen3-Next-80B-A3B-Instruct",
)  # fmt: skip
model(
    "grok-1", hidden=6144, inner=32768, num_experts=8, top_k=2, experts={"activation": "gelu_tanh"},
    vocab=131072, blocks=64, tied=True, attention=64 * gqa(6144, 48, 8, 128), norms=(4 * 64 + 1) * 6144,
    source="xai-org/grok-1, run.py and model.py",
)  # fmt: skip
for size, blocks, num_experts in (("20b", 24, 32), ("120b", 36, 128)):
    model(
        f"gpt-oss-{size}", hidden=2880, inner=2880, num_experts=num_experts, top_k=4,
        router={"score": "softmax_selected", "bias": True}, experts=GPT_OSS_EXPERTS, vocab=201088, blocks=blocks,
        attention=blocks * gqa(2880, 64, 8, 64, qkv_bias=True, out_bias=True, sinks=True),
        source=f"OpenAI 2025 (arXiv:2508.10925), tables 1 and 2; config.json of openai/gpt-oss-{size}",
    )  # fmt: skip
model(
    "olmoe", hidden=2048, inner=1024, num_experts=64, top_k=8, vocab=50304, blocks=16,
    attention=16 * (gqa(2048, 16, 16, 128) + 2 * 2048),  # norms over all heads' queries and keys
    source="Muennighoff et al. 2024 (arXiv:2409.02060), table 10; config.json of allenai/OLMoE-1B-7B-0924",
)  # fmt: skip
model(
    "gemma-4-26b", hidden=2816, inner=704, num_experts=128, top_k=8,
    router={"renormalize": True, "expert_scale": True}, experts={"activation": "gelu_tanh"},
    vocab=262144, blocks=30, tied=True, dense=30 * mlp(2816, 2112),
    attention=25 * gqa(2816, 16, 8, 256, qk_norm=True) + 5 * gqa(2816, 16, 2, 512, qk_norm=True, shared_kv=True),
    norms=(7 * 30 + 1) * 2816, extra=30 * 2816,  # the routers' own scale
    source="config.json of google/gemma-4-26B-A4B (text model, without the vision tower)",
    unsaid="gemma-4-26b's router normalises and scales its own input (RMSNorm · scale / sqrt(hidden)), and a dense "
    "layer runs beside the experts with norms of its own",
)  # fmt: skip
model(
    "glm-4.5", hidden=5120, inner=1536, num_experts=160, top_k=8, shared_inner=1536,
    router=DEEPSEEK_ROUTER | {"scale": 2.5},
    vocab=151552, blocks=92, moe_layers=89, attention=92 * gqa(5120, 96, 8, 128, qkv_bias=True, qk_norm=True),
    dense=3 * mlp(5120, 12288),
    source="GLM-4.5 team 2025 (arXiv:2508.06471), table 1; THUDM/slime, scripts/models/glm4.5-355B-A32B.sh",
)  # fmt: skip
model(
    "glm-4.5-air", hidden=4096, inner=1408, num_experts=128, top_k=8, shared_inner=1408, router=DEEPSEEK_ROUTER,
    vocab=151552, blocks=46, moe_layers=45, attention=46 * gqa(4096, 96, 8, 128, qkv_bias=True),
    dense=mlp(4096, 10944),
    source="GLM-4.5 team 2025 (arXiv:2508.06471), table 1; config.json of zai-org/GLM-4.5-Air",
)  # fmt: skip
for name, num_experts, dense in (("scout", 16, 0), ("maverick", 128, 24)):
    model(
        f"llama-4-{name}", hidden=5120, inner=8192, num_experts=num_experts, top_k=1, shared_inner=8192,
        router={"score": "sigmoid"}, experts={"weight_on": "input"}, vocab=202048, blocks=48, moe_layers=48 - dense,
        attention=48 * gqa(5120, 40, 8, 128), dense=dense * mlp(5120, 16384),
        source=f"config.json of meta-llama/Llama-4-{name.capitalize()}-17B-{num_experts}E (text model, without the "
        "vision tower)",
    )  # fmt: skip
model(
    "phi-3.5-moe", hidden=4096, inner=6400, num_experts=16, top_k=2,
    router_kind="sparse_mixer", router={"threshold": 0.01}, vocab=32064, blocks=32,
    unsaid="phi-3.5-moe multiplies what the experts see by noise in training (input_jitter_noise=0.01)",
    attention=32 * gqa(4096, 32, 8, 128, qkv_bias=True, out_bias=True),
    norms=2 * (2 * 32 + 1) * 4096, extra=32064,  # LayerNorms with biases; a bias on the output projection
    source="Abdin et al. 2024 (arXiv:2404.14219), section 5; config.json of microsoft/Phi-3.5-MoE-instruct",
)  # fmt: skip
model(
    "jamba", hidden=4096, inner=14336, num_experts=16, top_k=2, vocab=65536, blocks=32, moe_layers=16,
    attention=4 * gqa(4096, 32, 8, 128) + 28 * mamba(4096, 8192, 16, 4, 256), dense=16 * mlp(4096, 14336),
    source="Lieber et al. 2024 (arXiv:2403.19887), section 3; JambaConfig of transformers 5.23 (ai21labs/Jamba-v0.1)",
)  # fmt: skip

MODELS = tuple(PRESETS)  # the rest are layers alone

ALIASES = {
    "switch-base": "switch-base-8",
    "switch-xxl-128": "switch-xxl",
    "mixtral": "mixtral-8x7b",
    "qwen1.5-moe-a2.7b": "qwen1.5-moe",
    "qwen2-57b-a14b": "qwen2-57b",
    "qwen3-30b-a3b": "qwen3-30b",
    "qwen3-235b-a22b": "qwen3-235b",
    "qwen3-next-80b-a3b": "qwen3-next",
    "olmoe-1b-7b": "olmoe",
    "gemma-4-26b-a4b": "gemma-4-26b",
    "jamba-v0.1": "jamba",
    "grok": "grok-1",
    "grok1": "grok-1",
    "gemma-2-27b": "gemma-2",
    "gemma2": "gemma-2",
    "command-r+": "command-r-plus",
    "command-r": "command-r-plus",
    "gpt4": "gpt-4",
    "qwen2.5-moe": "qwen2.5-max",
}


def slices() -> None:
    """The standing shapes of the benches: one layer alone, no model around it."""
    alone: dict[str, Any] = {"embedding": 0, "backbone": 0, "moe_layers": 1, "tied": False, "unsaid": ""}
    mixtral, qwen3 = PRESETS["mixtral-8x7b"], PRESETS["qwen3-30b"]

    def cut(name: str, of: MoEConfig, what: str, **sizes: int) -> None:
        PRESETS[name] = of.replace(name=name, source=f"moe_ops: {of.name} {what}", **alone, **sizes)

    cut("mixtral-slice", mixtral, "at a quarter of both widths", hidden=1024, inner=3584)
    cut("qwen3-slice", qwen3, "with a quarter of its experts", num_experts=32)
    cut("deepseek-v3-ep8", PRESETS["deepseek-v3"], "on one of 8 ranks, without groups", num_experts=32)
    router = {key: value for key, value in PRESETS["deepseek-v3-ep8"].router.items() if key != "groups"}
    PRESETS["deepseek-v3-ep8"] = PRESETS["deepseek-v3-ep8"].replace(router=router)

    def shape(name: str, hidden: int, inner: int, num_experts: int, top_k: int, what: str) -> None:
        PRESETS[name] = MoEConfig(
            name=name, hidden=hidden, inner=inner, num_experts=num_experts, top_k=top_k, source=f"moe_ops: {what}"
        )

    shape("quick-wide", 512, 1024, 8, 2, "few wide experts, small enough for --quick")
    shape("quick-fine", 512, 256, 64, 4, "many narrow experts, small enough for --quick")
    shape("one-token", 16, 16, 8, 2, "nothing to compute: what remains is the host's work")
    shape("deepseek-slice", 1792, 512, 64, 8, "a quarter of deepseek-v3's widths and experts, routed by softmax")
    shape("odd", 1000, 1407, 7, 5, "sizes that no tile divides")


slices()
