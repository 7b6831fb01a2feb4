"""MoEConfig: presets against published totals and against transformers' own models, built layers, described memory."""

import dataclasses
import pickle

import pytest
import torch

import moe_ops
from moe_ops import MoEConfig
from moe_ops.config import presets

# Published billions (total, active) and how far rounding may carry them; "without": what is active without the
# embedding table, "tables": without embedding and output projection.
PUBLISHED = [
    ("mixtral-8x7b", 46.7, 12.9, "", 0.002),  # arXiv:2401.04088: "47B ... 13B"; Mistral AI's announcement: 46.7, 12.9
    ("mixtral-8x22b", 141, 39, "", 0.005),  # Mistral AI, "Cheaper, Better, Faster, Stronger"
    ("dbrx", 132, 36, "", 0.015),  # Databricks, "Introducing DBRX"
    ("deepseek-v2-lite", 15.7, 2.4, "without", 0.025),  # arXiv:2405.04434, appendix B
    ("deepseek-v2", 236, 21, "", 0.02),  # arXiv:2405.04434, abstract
    ("deepseek-v3", 671, 37, "without", 0.011),  # arXiv:2412.19437, abstract
    ("kimi-k2", 1000, 32, "without", 0.03),  # README: "1T", "32B"
    ("qwen1.5-moe", 14.3, 2.7, "", 0.005),  # model card of Qwen1.5-MoE-A2.7B
    ("qwen2-57b", 57, 14, "", 0.02),  # arXiv:2407.10671, table 1
    ("qwen3-30b", 30.5, 3.3, "", 0.02),  # model card of Qwen3-30B-A3B
    ("qwen3-235b", 235, 22, "", 0.01),  # model card of Qwen3-235B-A22B
    ("qwen3-next", 80, None, "", 0.005),  # its name
    ("grok-1", 314, None, "", 0.006),  # README; the sizes of its run.py give 315.7
    ("gpt-oss-20b", 20.91, 3.61, "without", 0.001),  # arXiv:2508.10925, table 1
    ("gpt-oss-120b", 116.83, 5.13, "without", 0.001),
    ("olmoe", 6.9, 1.3, "", 0.015),  # arXiv:2409.02060, abstract: 7 and 1; model card: 6.9 and 1.3
    ("gemma-4-26b", 25.2, 3.8, "", 0.01),  # model card
    ("glm-4.5", 355, 32, "tables", 0.01),  # arXiv:2508.06471, table 1
    ("glm-4.5-air", 106, 12, "tables", 0.016),
    ("llama-4-scout", 109, 17, "", 0.012),  # model card; the vision tower is in its 109
    ("llama-4-maverick", 400, 17, "", 0.012),
    ("phi-3.5-moe", 41.9, 6.6, "", 0.007),  # model card: "16x3.8B", 6.6B active; 41.9B in its safetensors
    ("jamba", 52, 12, "", 0.01),  # arXiv:2403.19887, section 3
    ("switch-base-128", 7.4, None, "", 0.003),  # arXiv:2101.03961, table 1: 7B and FLOP-matched
    ("switch-xxl", 395, None, "", 0.002),  # arXiv:2101.03961, table 9
]  # fmt: skip


@pytest.mark.parametrize(("name", "total", "active", "leaving", "rounding"), PUBLISHED, ids=[p[0] for p in PUBLISHED])
def test_totals_are_those_published(name, total, active, leaving, rounding):
    config = MoEConfig.preset(name)
    described = config.describe()
    assert described.total / 1e9 == pytest.approx(total, rel=rounding)
    if active is not None:
        tables = {"": 0, "without": config.embedding, "tables": 2 * config.embedding}[leaving]
        assert (described.active - tables) / 1e9 == pytest.approx(active, rel=rounding + 0.01)


def test_gpt_oss_to_the_last_parameter():
    """20,914,757,184 is what keras-hub states for its conversion of the published weights."""
    assert MoEConfig.preset("gpt-oss-20b").describe().total == 20_914_757_184


@pytest.mark.parametrize("name", MoEConfig.presets())
def test_every_preset_builds_and_counts_its_layer(name):
    config = MoEConfig.preset(name)
    assert config.name == name and config.source
    layer = config.build(approximate=True, device="meta")
    assert sum(parameter.numel() for parameter in layer.parameters()) == config.describe().layer_total
    if config.unsaid:
        with pytest.raises(ValueError, match="approximate=True builds the layer without it"):
            config.build(device="meta")
    groups = config.router.get("groups")
    experts = 2 * groups[0] if groups else config.top_k
    small = config.build(approximate=True, hidden=24, inner=10, num_experts=max(experts, config.top_k), latent=None)
    y = small(torch.randn(7, 24))
    assert y.shape == (7, 24) and bool(y.isfinite().all())


def transformers_config(name):
    """The published configuration, in transformers' words, written down independently of the preset."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    mixtral = {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48}
    dbrx_ffn = {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "hidden_size": 6144}
    dbrx = {"d_model": 6144, "n_heads": 48, "n_layers": 40, "vocab_size": 100352}
    v2 = {
        "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 160, "moe_intermediate_size": 1536, "n_group": 8,
        "topk_group": 3, "num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    qwen2 = {
        "hidden_size": 3584, "intermediate_size": 18944, "moe_intermediate_size": 2560, "num_attention_heads": 28,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 20480,
    }  # fmt: skip
    qwen3 = {"norm_topk_prob": True, "head_dim": 128}
    qwen235 = qwen3 | {
        "hidden_size": 4096, "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94,
    }  # fmt: skip
    glm = {
        "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92, "moe_intermediate_size": 1536,
        "n_routed_experts": 160, "first_k_dense_replace": 3, "routed_scaling_factor": 2.5, "attention_bias": True,
        "use_qk_norm": True, "head_dim": 128,
    }  # fmt: skip
    gemma = {
        "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
        "vocab_size": 262144, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "enable_moe_block": True,
        "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "num_kv_shared_layers": 0,
    }  # fmt: skip
    maverick = {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    lite = {
        "hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": None, "moe_intermediate_size": 1408, "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    }  # fmt: skip
    kimi = {
        "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827,
    }  # fmt: skip
    family, options = {
        "switch-base-8": (
            "switch_transformers",
            {"d_ff": 3072, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6},
        ),
        "mixtral-8x7b": ("mixtral", {}),
        "mixtral-8x22b": ("mixtral", mixtral),
        "dbrx": (
            "dbrx",
            dbrx | {"ffn_config": dbrx_ffn, "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 5e5}},
        ),
        "deepseek-v2-lite": ("deepseek_v2", lite),
        "deepseek-v2": ("deepseek_v2", v2),
        "deepseek-v3": ("deepseek_v3", {}),
        "kimi-k2": ("deepseek_v3", kimi),
        "qwen1.5-moe": ("qwen2_moe", {}),
        "qwen2-57b": ("qwen2_moe", qwen2),
        "qwen3-30b": ("qwen3_moe", qwen3 | {"num_hidden_layers": 48}),
        "qwen3-235b": ("qwen3_moe", qwen235),
        "qwen3-next": ("qwen3_next", {}),
        "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
        "gpt-oss-120b": ("gpt_oss", {}),
        "olmoe": ("olmoe", {"intermediate_size": 1024}),
        "gemma-4-26b": ("gemma4_text", gemma),
        "glm-4.5": ("glm4_moe", glm),
        "glm-4.5-air": ("glm4_moe", {"attention_bias": True, "head_dim": 128}),
        "llama-4-scout": ("llama4_text", {}),
        "llama-4-maverick": ("llama4_text", maverick),
        "phi-3.5-moe": ("phimoe", {"attention_bias": True, "lm_head_bias": True, "input_jitter_noise": 0.01}),
        "jamba": ("jamba", {}),
    }[name]
    try:
        return transformers.AutoConfig.for_model(family, **options)
    except ValueError:
        pytest.skip(f"this version of transformers has no {family}")


# These build the whole model, though without memory: the largest are left to the published totals above.
COUNTED = (
    "switch-base-8", "mixtral-8x7b", "dbrx", "deepseek-v2-lite", "qwen1.5-moe", "qwen3-30b", "qwen3-next",
    "gpt-oss-20b", "olmoe", "gemma-4-26b", "glm-4.5-air", "llama-4-maverick", "phi-3.5-moe", "jamba",
)  # fmt: skip
SAID = (
    "hidden", "inner", "num_experts", "top_k", "router_kind", "router", "experts", "shared_inner", "shared_gate",
    "moe_layers",
)  # fmt: skip
DEFAULTS = {"activation": "silu", "gated": True, "renormalize": False, "scale": 1.0, "score": "softmax"}


def said(config):
    """The layer's fields, options left at their defaults made explicit."""
    fields = {name: getattr(config, name) for name in SAID}
    for name in ("router", "experts"):
        fields[name] = {key: value for key, value in fields[name].items() if DEFAULTS.get(key) != value}
    return fields


WITHOUT_HF = {"grok-1", "switch-base-128", "switch-xxl"}  # no config of transformers stands for these


@pytest.mark.parametrize("name", [n for n in presets.MODELS if n not in WITHOUT_HF])
def test_from_hf_says_what_the_preset_says(name):
    preset = MoEConfig.preset(name)
    read = MoEConfig.from_hf(transformers_config(name), count=name in COUNTED)
    assert said(read) == said(preset)
    assert bool(read.unsaid) == bool(preset.unsaid) or name == "switch-base-8"
    if name in COUNTED:
        ours, theirs = preset.describe(), read.describe()
        assert (preset.embedding, preset.backbone, preset.tied) == (read.embedding, read.backbone, read.tied)
        assert (ours.total, ours.active, ours.flops_per_token) == (theirs.total, theirs.active, theirs.flops_per_token)


def kept(layer, x):
    """Bytes that one forward of the experts keeps beside parameters and x, and of x, each storage once."""
    held, own = {}, {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.no_grad():
        weights, experts = layer.router(x)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer.experts(x, weights, experts)
        if layer.shared is not None:
            ones = torch.ones(len(x), 1, requires_grad=True)
            y = y + layer.shared(x, ones, torch.zeros(len(x), 1, dtype=torch.int32))
        y.sum().backward()
    return sum(size for size, _ in held.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen1.5-moe", "switch-base-8", "gpt-oss-20b"])
def test_saved_bytes_are_those_that_autograd_holds(name, dtype):
    tokens, small = 150, {"hidden": 32, "inner": 24, "num_experts": 8}
    config = MoEConfig.preset(name)
    config = config.replace(**small, capacity_factor=None, shared_inner=40 if config.shared_inner else 0)
    layer = config.build(dtype=dtype)
    expected = config.describe(tokens).saved_bytes[str(dtype).removeprefix("torch.")]
    measured = kept(layer, torch.randn(tokens, 32, dtype=dtype))
    plans = 4 * 2 * tokens * (config.top_k + 1)
    assert expected - plans <= measured <= expected, "only a plan's tensors may be kept less than the law says"


def test_flops_are_those_of_the_multiplications():
    """torch counts the multiply-adds of the same layer, written with plain linear layers over the active experts."""
    from torch.utils.flop_counter import FlopCounterMode

    config = MoEConfig(hidden=16, inner=8, num_experts=6, top_k=2, shared_inner=12, backbone=16 * 5, embedding=70)
    x, gate, tokens = torch.randn(10, 16), torch.randn(6, 16), 10
    with FlopCounterMode(display=False) as counter:
        x @ gate.T
        for inner in (8, 8, 12):
            (x @ torch.randn(16, 2 * inner))[:, :inner] @ torch.randn(inner, 16)
        x @ torch.randn(16, 5)
    assert config.describe().flops_per_token * tokens == counter.get_total_flops()
    assert config.replace(tied=True).describe().flops_per_token * tokens == counter.get_total_flops() + 2 * 10 * 70


def test_description_is_a_table():
    described = MoEConfig.preset("mixtral").describe(1024)
    text = str(described)
    assert text.splitlines()[0] == "mixtral-8x7b"
    assert "46.7B, active 12.9B" in text and "T=1024" in text
    assert described.bytes["bfloat16"] == 2 * described.total and described.bytes["int4"] * 2 == described.total


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Command R+", "Command R\\+ is a dense model"),
        ("gemma-2", "Gemma 2 is dense"),
        ("GPT-4", "architecture is unpublished"),
        ("qwen2.5-max", "sizes are unpublished"),
        ("mixtral-9x9b", "name must be one of switch-base-8, .*, got 'mixtral-9x9b'"),
    ],
)
def test_names_without_a_preset_say_why(name, text):
    with pytest.raises(ValueError, match=f"MoEConfig.preset: .*{text}"):
        MoEConfig.preset(name)


def test_names_are_forgiving_and_copies_are_the_callers():
    config = MoEConfig.preset("Mixtral 8x7B")
    config.router["scale"] = 2.0
    assert MoEConfig.preset("mixtral_8x7b").router == {"renormalize": True}
    assert all(alias not in presets.PRESETS for alias in presets.ALIASES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 3
    assert pickle.loads(pickle.dumps(config)) == config and isinstance(hash(config), int)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"MoEConfig: top_k must be between 1 and num_experts \(4\), got 5"):
        MoEConfig(hidden=8, inner=8, num_experts=4, top_k=5)
    with pytest.raises(TypeError, match=r"MoEConfig: router must be a mapping of options"):
        MoEConfig(hidden=8, inner=8, num_experts=4, top_k=2, router="softmax")
    with pytest.raises(ValueError, match=r"MoEConfig: router_kind must be one of top_k, .*sparse_mixer, got 'hash'"):
        MoEConfig(hidden=8, inner=8, num_experts=4, top_k=2, router_kind="hash")
    with pytest.raises(TypeError, match=r"MoEConfig: router_kind must be a str, got list"):
        MoEConfig(hidden=8, inner=8, num_experts=4, top_k=2, router_kind=["switch"])
    with pytest.raises(ValueError, match=r"MoEConfig: top_k must be 1 with router_kind 'switch', got 2"):
        MoEConfig(hidden=8, inner=8, num_experts=4, top_k=2, router_kind="switch")
    for wrong, text in (
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"capacity_factor": -1.0}, "capacity_factor must be greater than 0, got -1.0"),
        ({"drop_policy": "last"}, "drop_policy must be one of .*, got 'last'"),
        ({"tied": "yes"}, "tied must be True or False, got str 'yes'"),
        ({"name": 3}, "name must be a str, got int 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^MoEConfig: {text}"):
            MoEConfig(hidden=8, inner=8, num_experts=4, top_k=2, **wrong)
    for options in ({"router": {"gruops": (2, 1)}}, {"router": {"top_k": 3}}, {"experts": {"activatoin": "silu"}}):
        (kind, (wrong, *_)) = next(iter(options.items()))
        with pytest.raises(TypeError, match=rf"^MoEConfig: {kind} must have options among .*, got '{wrong}'"):
            MoEConfig(hidden=8, inner=8, num_experts=4, top_k=2, **options)
    with pytest.raises(TypeError, match=r"changes must be among hidden, inner, .*, got 'width'"):
        MoEConfig.preset("olmoe").replace(width=3)
    with pytest.raises(TypeError, match=r"MoEConfig.preset: name must be a str, got int"):
        MoEConfig.preset(4)
    with pytest.raises(TypeError, match=r"MoEConfig.from_hf: config must be a transformers config .*, got dict"):
        MoEConfig.from_hf({"model_type": "mixtral"})


def test_a_dense_config_of_transformers_is_refused():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(ValueError, match=r"config.model_type must be one of dbrx, .*, got 'llama'"):
        MoEConfig.from_hf(transformers.AutoConfig.for_model("llama"))


def test_a_built_layer_is_the_layer_of_its_options():
    config = MoEConfig.preset("gpt-oss-20b")
    torch.manual_seed(0)
    built = config.build(hidden=16, inner=12, num_experts=8)
    x = torch.randn(5, 16)
    weights, experts = moe_ops.route(x @ built.router.weight.T + built.router.bias, 4, score="softmax_selected")
    e = built.experts
    expected = moe_ops.reference.moe_mlp(
        x, weights, experts, e.w_in, e.w_out, b_in=e.b_in, b_out=e.b_out, layout="interleaved", alpha=1.702, limit=7.0,
        up_offset=1.0,
    )  # fmt: skip
    torch.testing.assert_close(built(x), expected, rtol=1e-4, atol=1e-5)


def test_switch_is_built_with_its_own_router_and_start():
    """Truncated normal of scale 0.1: nothing beyond two deviations, where nn.Router would be uniform."""
    layer = MoEConfig.preset("switch-base-8").build(hidden=64, inner=12)
    assert type(layer.router) is moe_ops.nn.SwitchRouter and layer.router.jitter == 0.01
    deviation = (0.1 / 64) ** 0.5
    assert layer.router.weight.abs().max() <= 2 * deviation and layer.router.weight.std() < 1.1 * deviation


def test_phi_is_built_with_sparse_mixer():
    """Its config's router_jitter_noise is SparseMixer's threshold; input_jitter_noise is what MoE does not have."""
    layer = MoEConfig.preset("phi-3.5-moe").build(hidden=16, inner=12, approximate=True)
    assert type(layer.router) is moe_ops.nn.SparseMixerRouter
    assert (layer.router.threshold, layer.router.jitter) == (0.01, 0.0)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.AutoConfig.for_model("phimoe", router_jitter_noise=0.25, input_jitter_noise=0.5)
    read = MoEConfig.from_hf(config, count=False)
    assert read.router == {"threshold": 0.25} and "input_jitter_noise=0.5" in read.unsaid
    mixtral = transformers.AutoConfig.for_model("mixtral", router_jitter_noise=0.5)
    assert MoEConfig.from_hf(mixtral, count=False).unsaid.startswith("mixtral multiplies what the experts see")
