"""transformers' MoE families: the class that stands for each, and a config of it so small that a test can run it."""

import importlib
import re
from pathlib import Path

CLASSES = {
    "afmoe": "AfmoeForCausalLM", "aria": "AriaTextForCausalLM", "axk1": "AXK1ForCausalLM", "axk2": "AXK2ForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM", "beam": "BeamForCausalLM", "cohere2_moe": "Cohere2MoeForCausalLM",
    "dbrx": "DbrxForCausalLM", "deepseek_ocr2": "DeepseekOcr2ForConditionalGeneration",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM", "deepseek_v4": "DeepseekV4ForCausalLM",
    "diffusion_gemma": "DiffusionGemmaForBlockDiffusion", "dots1": "Dots1ForCausalLM",
    "dots3_note": "Dots3NoteForCausalLM", "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeForConditionalGeneration", "exaone_moe": "ExaoneMoeForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM", "flint": "FlintForCausalLM", "gemma4": "Gemma4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM", "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration", "glm5_next": "Glm5NextForConditionalGeneration",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM", "gpt_oss": "GptOssForCausalLM", "granitemoe": "GraniteMoeForCausalLM",
    "granitemoe_swa": "GraniteMoeSWAForCausalLM", "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM", "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "hy_v3": "HYV3ForCausalLM", "hy_v4": "HYV4ForCausalLM", "hy_v4_vl": "HYV4VLForConditionalGeneration",
    "inkling": "InklingForCausalLM", "inkling2": "Inkling2ForCausalLM", "inkling2_loop": "Inkling2LoopForCausalLM",
    "jamba": "JambaForCausalLM", "jetmoe": "JetMoeForCausalLM", "kimi_linear": "KimiLinearForCausalLM",
    "kolibri1": "Kolibri1ForCausalLM", "laguna": "LagunaForCausalLM", "lara_mini": "LaraMiniForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM", "llama4": "Llama4ForCausalLM", "longcat_flash": "LongcatFlashForCausalLM",
    "mellum": "MellumForCausalLM", "mimo_v2_flash": "MiMoV2FlashForCausalLM", "minimax": "MiniMaxForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM", "minimax_m3_vl": "MiniMaxM3VLForCausalLM",
    "mistral4": "Mistral4ForCausalLM", "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "mixtral": "MixtralForCausalLM", "muse_spark": "MuseSparkForConditionalGeneration",
    "nemotron_h": "NemotronHForCausalLM", "nllb_moe": "NllbMoeForConditionalGeneration", "olmoe": "OlmoeForCausalLM",
    "openai_privacy_filter": "OpenAIPrivacyFilterForTokenClassification", "phimoe": "PhimoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_5_moe": "Qwen3_5MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM", "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration", "qwen4_exp": "Qwen4ExpForCausalLM",
    "solar_open": "SolarOpenForCausalLM", "step3p7": "Step3p7ForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "unlimited_ocr": "UnlimitedOcrForConditionalGeneration", "zaya": "ZayaForCausalLM",
}  # fmt: skip

# What the families call their sizes; a config takes those that it has.
TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "expert_ffn_hidden_size": 24,
    "ffn_hidden_size": 24,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "moe_num_shared_experts": 1,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 0, "num_dense_layers": 0, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_topk": 8, "index_n_heads": 2, "index_head_dim": 16, "o_groups": 2, "o_lora_rank": 8,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_conv": 4,
    "mamba_dt_rank": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_head_dim": 8, "linear_num_heads": 4, "sliding_window": 16,
    "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "moe_hidden_size": 24,
    "router_hidden_size": 16, "moe_shared_expert_intermediate_size": 24, "shared_intermediate_size": 24,
    "projector_hidden_size": 32,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "unpadded_vocab_size": 128,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "mlp_layer_types": ["sparse", "sparse"], "moe_layer_start_index": 0,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "d_model": 32, "d_ff": 24, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "encoder_sparse_step": 1, "expert_capacity": 5, "decoder_start_token_id": 0,
    "moe_token_dropout": 0.2,
}  # fmt: skip

# Towers for images and sound: built, but given nothing.
TOWER = {
    "hidden_size": 32, "intermediate_size": 24, "depth": 1, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_heads": 4, "num_key_value_heads": 4, "patch_size": 4, "image_size": 16, "out_hidden_size": 32,
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 24, "output_dim": 32,
    "deepstack_visual_indexes": [0], "global_attn_indexes": [0], "num_position_embeddings": 16,
    "patch_sizes": [4], "hidden_sizes": [32], "depths": [1],
}  # fmt: skip

SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [1, 1, 2]}
# Two layers, with experts in both, of which one has the attention of most models.
OPTIONS = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "dbrx": {
        "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"top_k_experts": 2},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 16], "rope_parameters": SECTIONS},
    "gemma4": {"enable_moe_block": True, "top_k_experts": 2},
    "glm4v_moe": {"rope_parameters": SECTIONS},
    "glm5_next": {"index_kpool": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hy_v4_vl": {"rope_parameters": SECTIONS | {"mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"interleave_moe_layer_step": 1},
    "longcat_flash": {"zero_expert_num": 4, "num_layers": 1},
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
WHOLE = {"diffusion_gemma": {"canvas_length": 6}, "qwen3_omni_moe": {"vision_start_token_id": 120}}


def experts_classes():
    """(family, name) of every experts class that is a plug-in, from the sources: importing them takes a minute."""
    import transformers

    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for match in re.finditer(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.M):
            found.append((path.parent.name, match[1]))
    return found


def module_of(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def tiny_config(family):
    kind = getattr(module_of(family), CLASSES[family]).config_class
    return _config(kind, OPTIONS.get(family, {}), WHOLE.get(family, {}), TINY)


def _config(kind, options, whole, sizes):
    """A config of this class and of all its parts. options are those of the part for text, where there is one."""
    default = kind()
    known = default.to_dict().keys() | kind.attribute_map.keys()
    parts = {
        name: type(getattr(default, name)) for name in kind.sub_configs or {} if getattr(default, name) is not None
    }
    has_text = any("text" in name for name in parts)
    own = {key: value for key, value in sizes.items() if key in known} | whole | ({} if has_text else options)
    if own.get("kv_lora_rank"):
        own["num_key_value_heads"] = own["num_attention_heads"]
    for name, part in parts.items():
        if name not in own:
            own[name] = _config(part, options, {}, TINY) if "text" in name else _config(part, {}, {}, TOWER)
    return kind(**own)
