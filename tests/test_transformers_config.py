"""MoEConfig.from_hf against the blocks that transformers builds from the same config, with the same weights."""

from types import SimpleNamespace

import pytest
import torch

from transformers_models import one_thread, tiny_model

pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed (extra [transformers])")

from moe_ops import MoEConfig

FAMILIES = [
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite",
    "glm4v_moe", "glm_moe_dsa", "gpt_oss", "granitemoe", "jamba", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "solar_open",
]  # fmt: skip


@torch.no_grad()
def take_over(layer, block):
    """The block's weights into the layer; every parameter of both is used."""
    experts, used = block.experts, 0

    def copy(target, *sources):
        nonlocal used
        target.copy_(torch.cat(sources) if len(sources) > 1 else sources[0])
        used += target.numel()

    turned = (lambda w: w.transpose(1, 2)) if experts.is_transposed else (lambda w: w)
    copy(layer.experts.w_in, turned(experts.gate_up_proj))
    copy(layer.experts.w_out, turned(experts.down_proj))
    if experts.has_bias:
        copy(layer.experts.b_in, experts.gate_up_proj_bias)
        copy(layer.experts.b_out, experts.down_proj_bias)
    router = next(m for name, m in block.named_modules() if name.rpartition(".")[2] in ("gate", "router"))
    copy(layer.router.weight, next(p for p in router.parameters() if p.shape == layer.router.weight.shape))
    if layer.router.bias is not None:
        copy(layer.router.bias, router.bias)
    if layer.router.selection_bias is not None:
        bias = [b for b in block.buffers() if b.numel() == layer.router.num_experts]
        layer.router.selection_bias.copy_(bias[0].flatten())
    shared = getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
    if layer.shared is not None:
        copy(layer.shared.w_in[0], shared.gate_proj.weight, shared.up_proj.weight)
        copy(layer.shared.w_out[0], shared.down_proj.weight)
    if layer.shared_gate is not None:
        copy(layer.shared_gate.weight, block.shared_expert_gate.weight)
    assert used == sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in block.parameters())


def test_a_field_is_missing_or_none():
    with pytest.raises(ValueError, match=r"MoEConfig\.from_hf: config must have what mixtral's has .* no attribute"):
        MoEConfig.from_hf(SimpleNamespace(model_type="mixtral"), count=False)
    config = SimpleNamespace(model_type="granitemoe", hidden_act=["silu"], intermediate_size=8, hidden_size=8)
    config.num_hidden_layers, config.num_local_experts = 1, 2
    with pytest.raises(ValueError, match=r"MoEConfig\.from_hf: config must have what granitemoe's has"):
        MoEConfig.from_hf(config, count=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_transformers_block(family):
    with one_thread():
        model = tiny_model(family)
        blocks = [m for m in model.modules() if hasattr(getattr(m, "experts", None), "_is_expert_parallel")]
        config = MoEConfig.from_hf(model.config, count=False)
        assert config.moe_layers == len(blocks)
        layer = config.build()
        take_over(layer, blocks[0])
        x = torch.randn(2, 9, config.hidden, generator=torch.Generator().manual_seed(5))
        expected = blocks[0](x)
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=5e-6)
