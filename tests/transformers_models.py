"""Tiny models of transformers' MoE families, with random weights, and what they compute: logits and all gradients."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import torch

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
    "linear_value_head_dim": 8, "sliding_window": 16, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# Two layers with attention in one of them, and experts in both.
OPTIONS = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}


class Permissive(SimpleNamespace):
    """A config that an experts class can be built from alone."""

    hidden_size = moe_hidden_size = 24
    hidden_act, hidden_activation, mlp_hidden_act = "silu", "gelu_pytorch_tanh", "relu2"
    num_experts = num_local_experts = n_routed_experts = moe_num_experts = 8
    moe_intermediate_size = intermediate_size = 20
    swiglu_limit, swiglu_alpha, mlp_gate_softcap, mlp_up_softcap = 1.0, 1.702, 2.0, 2.0
    post_norm_eps, moe_latent_size = 1e-5, None
    _experts_implementation = "eager"


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


def tiny_model(name, **options):
    """AutoModelForCausalLM of a small config, in float32, every parameter drawn."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = type(AutoConfig.for_model(name))
    known = kind().to_dict().keys() | kind.attribute_map.keys()
    sizes = {key: value for key, value in TINY.items() if key in known}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**(sizes | OPTIONS.get(name, {}) | options))).eval()
    return draw(model)


def draw(model):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5, generator=generator)
            elif "norm" not in name:
                parameter.normal_(std=0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(std=0.02, generator=generator)
    return model


def ids(rows=2, length=17):
    return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))


def logits_and_gradients(model, tokens):
    """Logits, and the gradient of every parameter that has one, by name, for a fixed outgoing gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(tokens, use_cache=False).logits
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits.backward(gradient.to(logits.dtype) / logits.shape[1])
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model, tokens, ours, eager, tolerance):
    """Those of every parameter, up to `tolerance` of its largest value. Where a model is so ill-conditioned that
    float32 itself does not hold that (Gemma 4's norms), ours may be twice as far from float64 as eager is.

    model: as transformers made it, for float64.
    """
    assert ours.keys() == eager.keys()
    largest = max(value.abs().max().item() for value in eager.values())
    exact = None
    for key, value in eager.items():
        allowed = tolerance * max(value.abs().max().item(), 1e-2 * largest)  # a router's may cancel to noise
        if (ours[key] - value).abs().max() <= allowed:
            continue
        if exact is None:
            model.double().set_experts_implementation("eager")
            exact = logits_and_gradients(model, tokens)[1]
        off, eager_off = ((gradient - exact[key]).abs().max().item() for gradient in (ours[key], value))
        assert off <= 2 * eager_off + allowed / 2, f"{key}: {off} from float64, eager {eager_off}, allowed {allowed}"
