"""What a transformers config says of its MoE layers: one small reader per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_ops.config.config import MoEConfig
from moe_ops.config.describe import layer_parameters

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip


def experts(config: Any, name: str = "hidden_act", **options: Any) -> dict[str, Any]:
    act = getattr(config, name)
    if act not in ACTIVATIONS:
        raise ValueError(f"MoEConfig.from_hf: config.{name} must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    return {"activation": ACTIVATIONS[act], **options}


def plain(config: Any, **layer: Any) -> dict[str, Any]:
    """The names that most families share."""
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    defaults = {
        "hidden": config.hidden_size, "inner": inner, "num_experts": getattr(config, "num_local_experts", None),
        "top_k": getattr(config, "num_experts_per_tok", None), "moe_layers": config.num_hidden_layers,
    }  # fmt: skip
    if defaults["num_experts"] is None:
        defaults["num_experts"] = config.num_experts
    if "experts" not in layer:
        layer["experts"] = experts(config)
    return defaults | layer


def sparse_layers(config: Any) -> int:
    """Qwen's: every decoder_sparse_step-th layer that mlp_only_layers does not name."""
    blocks = range(config.num_hidden_layers)
    return sum(i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0 for i in blocks)


def qwen(config: Any) -> dict[str, Any]:
    shared = getattr(config, "shared_expert_intermediate_size", 0) or 0
    return plain(
        config,
        router={"renormalize": bool(config.norm_topk_prob)},
        shared_inner=shared,
        shared_gate=shared > 0,
        moe_layers=sparse_layers(config),
    )


def by_type(config: Any) -> int:
    """Layers that mlp_layer_types calls sparse, or where there are no types, those behind the first dense ones."""
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None:
        return sum(kind == "sparse" for kind in kinds)
    return int(config.num_hidden_layers - (getattr(config, "first_k_dense_replace", 0) or 0))


def deepseek(config: Any, router: dict[str, Any]) -> dict[str, Any]:
    def either(name: str, other: str) -> int:
        return int(getattr(config, name, None) or getattr(config, other, None) or 0)

    return plain(
        config,
        num_experts=either("n_routed_experts", "num_experts"),
        router=router | {"scale": float(config.routed_scaling_factor)},
        shared_inner=either("n_shared_experts", "num_shared_experts") * config.moe_intermediate_size,
        moe_layers=by_type(config),
    )


def deepseek_v2(config: Any) -> dict[str, Any]:
    router: dict[str, Any] = {}
    if config.topk_method == "group_limited_greedy":
        groups = (config.n_group, config.topk_group)
        router = {"groups": groups, "group_score": "max", "group_mask": "zero"}
    return deepseek(config, router)


def deepseek_v3(config: Any) -> dict[str, Any]:
    router: dict[str, Any] = {"score": "sigmoid", "correction_bias": True, "renormalize": bool(config.norm_topk_prob)}
    if config.n_group and config.n_group > 1:
        router["groups"] = (config.n_group, config.topk_group)
    return deepseek(config, router)


def minimax_m2(config: Any) -> dict[str, Any]:
    return plain(config, router={"score": "sigmoid", "correction_bias": True, "renormalize": True})


def mellum(config: Any) -> dict[str, Any]:
    return plain(config, router={"renormalize": bool(config.norm_topk_prob)}, moe_layers=by_type(config))


def qwen3_5(config: Any) -> dict[str, Any]:
    return plain(
        config,
        router={"renormalize": True},
        shared_inner=config.shared_expert_intermediate_size,
        shared_gate=True,
    )


def gpt_oss(config: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"bias": True, "layout": "interleaved", "up_offset": 1.0}
    options |= {"alpha": getattr(config, "swiglu_alpha", 1.702), "limit": getattr(config, "swiglu_limit", 7.0)}
    router = {"score": "softmax_selected", "bias": True}
    return plain(config, router=router, experts=experts(config, **options))


def dbrx(config: Any) -> dict[str, Any]:
    ffn = config.ffn_config
    power = ffn.moe_normalize_expert_weights
    act = ACTIVATIONS.get(ffn.ffn_act_fn["name"])
    if act is None:
        raise ValueError(f"MoEConfig.from_hf: config.ffn_config.ffn_act_fn is not known here: {ffn.ffn_act_fn}")
    return {
        "hidden": config.d_model, "inner": ffn.ffn_hidden_size, "num_experts": ffn.moe_num_experts,
        "top_k": ffn.moe_top_k, "router": {} if power is None else {"renormalize": "pnorm", "p": float(power)},
        "experts": {"activation": act}, "moe_layers": config.n_layers,
    }  # fmt: skip


def gemma4(config: Any) -> dict[str, Any]:
    if not config.enable_moe_block:
        raise ValueError("MoEConfig.from_hf: config.enable_moe_block is False: a dense Gemma 4 has no experts")
    return plain(
        config,
        num_experts=config.num_experts,
        top_k=config.top_k_experts,
        router={"renormalize": True, "expert_scale": True},
        experts=experts(config, "hidden_activation"),
        unsaid=MoEConfig.preset("gemma-4-26b").unsaid.replace("gemma-4-26b", "gemma4"),
    )


def llama4(config: Any) -> dict[str, Any]:
    return plain(
        config,
        router={"score": "sigmoid"},
        experts=experts(config, weight_on="input"),
        shared_inner=config.intermediate_size,
        moe_layers=len(config.moe_layers),
    )


def jamba(config: Any) -> dict[str, Any]:
    blocks = range(config.num_hidden_layers)
    sparse = sum(i % config.expert_layer_period == config.expert_layer_offset for i in blocks)
    return plain(config, num_experts=config.num_experts, moe_layers=sparse)


def noise_on_experts(config: Any, name: str) -> str:
    """What is to be said of a config whose noise is on the experts' input, not the router's alone."""
    value = getattr(config, name)
    return f"{config.model_type} multiplies what the experts see by noise in training ({name}={value})" if value else ""


def mixtral(config: Any) -> dict[str, Any]:
    unsaid = noise_on_experts(config, "router_jitter_noise")
    return plain(config, router={"renormalize": True}, unsaid=unsaid)


def phimoe(config: Any) -> dict[str, Any]:
    unsaid = noise_on_experts(config, "input_jitter_noise")
    # What the family calls the router's noise is SparseMixer's threshold.
    router = {"threshold": config.router_jitter_noise}
    return plain(config, router_kind="sparse_mixer", router=router, unsaid=unsaid)


def switch(config: Any) -> dict[str, Any]:
    return {
        "hidden": config.d_model, "inner": config.d_ff, "num_experts": config.num_experts, "top_k": 1,
        "router_kind": "switch", "router": {"jitter": config.router_jitter_noise},
        "experts": experts(config, "dense_act_fn", gated=False),
        "moe_layers": config.num_sparse_encoder_layers + config.num_sparse_decoder_layers,
        "unsaid": f"switch_transformers' capacity is {config.expert_capacity} tokens per sequence, MoE's is a factor "
        "of the batch",
    }  # fmt: skip


READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "dbrx": dbrx,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v3,
    "dots1": deepseek_v3,
    "exaone_moe": deepseek_v3,
    "flex_olmo": lambda config: plain(config, router={"renormalize": bool(config.norm_topk_prob)}),
    "gemma4_text": gemma4,
    "glm4_moe": deepseek_v3,
    "glm4_moe_lite": deepseek_v3,
    "glm4v_moe_text": deepseek_v3,
    "glm_moe_dsa": deepseek_v3,
    "gpt_oss": gpt_oss,
    "granitemoe": lambda config: plain(config, router={"score": "softmax_selected"}),
    "jamba": jamba,
    "llama4_text": llama4,
    "mellum": mellum,
    "minimax": lambda config: plain(config, router={"renormalize": True}),
    "minimax_m2": minimax_m2,
    "mixtral": mixtral,
    "olmoe": lambda config: plain(config, router={"renormalize": bool(config.norm_topk_prob)}),
    "phimoe": phimoe,
    "qwen2_moe": qwen,
    "qwen3_5_moe_text": qwen3_5,
    "qwen3_moe": qwen,
    "qwen3_next": qwen,
    "qwen3_vl_moe_text": lambda config: plain(config, router={"renormalize": True}),
    "solar_open": deepseek_v3,
    "switch_transformers": switch,
}


def around(config: Any, layers: int) -> dict[str, Any]:
    """embedding, tied and backbone, from the model itself, built on the meta device."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if config.model_type == "switch_transformers" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    tied = bool(config.tie_word_embeddings)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding: int = model.get_input_embeddings().weight.numel()
    if tied and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        total -= embedding  # tied only when weights are loaded
    if total - embedding < layers:
        raise RuntimeError(
            f"MoEConfig.from_hf: the model has {total} parameters, fewer than its MoE layers should: {layers}"
        )
    return {"embedding": embedding, "tied": tied, "backbone": total - embedding - layers}


def read(config: Any, count: bool) -> MoEConfig:
    if isinstance(config, dict) or not hasattr(config, "model_type"):
        expected = "a transformers config (AutoConfig.from_pretrained, or AutoConfig.for_model(**config_json))"
        raise TypeError(f"MoEConfig.from_hf: config must be {expected}, got {type(config).__name__}")
    name = getattr(config, "_name_or_path", "")
    if config.model_type not in READERS and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    reader = READERS.get(config.model_type)
    if reader is None:
        families = ", ".join(READERS)
        raise ValueError(f"MoEConfig.from_hf: config.model_type must be one of {families}, got {config.model_type!r}")
    name = name or config.model_type
    try:
        said = reader(config)
    except (AttributeError, TypeError) as error:
        needs = f"config must have what {config.model_type}'s has in transformers"
        raise ValueError(f"MoEConfig.from_hf: {needs}, got one where {error}") from None
    read = MoEConfig(name=name, source=f"the {type(config).__name__} of {name}", **said)
    if not count:
        return read
    layers = read.moe_layers * layer_parameters(read, read.num_experts)
    return read.replace(**around(config, layers))
