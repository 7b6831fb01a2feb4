"""Independent code: transformers' own routers and its Mixtral block."""

import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import moe_ops
from accuracy import assert_as_accurate, assert_bitwise_equal, place
from cases import randn

pytest.importorskip("transformers", reason="transformers is not installed (it is in the extra [transformers])")

HIDDEN, EXPERTS, TOP_K, TOKENS = 24, 16, 4, 50
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    num_experts_per_tok=TOP_K,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    zero_expert_num=0,
    n_group=4,
    topk_group=2,
    topk_method="group_limited_greedy",
    norm_topk_prob=True,
    moe_norm_min=0.3,
    routed_scaling_factor=2.5,
    output_multiplier=1.0,
    use_expert_bias=False,
    expert_selection_fn="softmax",
)
NOAUX = {"score": "sigmoid", "groups": (4, 2), "renormalize": True, "scale": 2.5}

# (models/<name>, class, options; "bias" names the module's correction bias)
ROUTERS = [
    ("mixtral", "MixtralTopKRouter", {"renormalize": True, "eps": 0.0}),
    ("qwen2_moe", "Qwen2MoeTopKRouter", {"renormalize": True, "eps": 0.0}),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {"renormalize": True, "eps": 0.0}),
    ("olmoe", "OlmoeTopKRouter", {"renormalize": True, "eps": 0.0}),
    ("granitemoe", "GraniteMoeTopKRouter", {"score": "softmax_selected"}),
    ("gpt_oss", "GptOssTopKRouter", {"score": "softmax_selected"}),
    ("jamba", "JambaTopKRouter", {}),
    ("deepseek_v2", "DeepseekV2TopkRouter",
     {"groups": (4, 2), "group_score": "max", "group_mask": "zero", "scale": 2.5}),
    ("deepseek_v3", "DeepseekV3TopkRouter", NOAUX | {"bias": "e_score_correction_bias"}),
    ("glm4_moe", "Glm4MoeTopkRouter", NOAUX | {"bias": "e_score_correction_bias"}),
    ("dots1", "Dots1TopkRouter", NOAUX | {"bias": "e_score_correction_bias"}),
    ("mistral4", "Mistral4TopkRouter", {"groups": (4, 2), "group_mask": "zero", "renormalize": True, "scale": 2.5}),
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter",
     {"renormalize": "clamp", "eps": 0.3, "bias": "moe_statics.e_score_correction_bias"}),
    ("lfm2_moe", "Lfm2MoeTopKRouter", {"score": "sigmoid", "renormalize": True, "eps": 1e-6, "scale": 2.5}),
    ("longcat_flash", "LongcatFlashTopkRouter", {"scale": 2.5, "bias": "e_score_correction_bias"}),
    ("cohere2_moe", "Cohere2MoeTopKRouter", {"score": "softmax_selected"}),
    ("muse_spark", "MuseSparkTopkRouter",
     {"score": "sigmoid", "renormalize": True, "eps": 1e-15, "scale": 2.5, "bias": "e_score_correction_bias"}),
]  # fmt: skip


@pytest.mark.parametrize("model, name, options", ROUTERS, ids=[router[0] for router in ROUTERS])
def test_routers(model, name, options, device):
    """Experts, and weights by expert (some sort them otherwise), from the logits that the router itself computes."""
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        pytest.skip(f"this version of transformers has no {model}")
    options, router = dict(options), getattr(module, name)(CONFIG)
    bias = options.pop("bias", None)
    with torch.no_grad():
        for seed, parameter in enumerate(router.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed, scale=0.5))
        if bias is not None:
            values = router.get_parameter(bias) if "." in bias else getattr(router, bias)
            values.copy_(randn(*values.shape, seed=9, scale=0.05))
            options["selection_bias"] = place(values.detach().flatten().float(), device)
        logits, theirs, chosen = router(randn(TOKENS, HIDDEN, seed=5))
    weights, experts = moe_ops.route(place(logits.float(), device), TOP_K, **options)
    by_expert = torch.zeros(TOKENS, EXPERTS)
    expected = by_expert.scatter(1, chosen, theirs.float())
    ours = by_expert.scatter(1, experts.cpu().long(), weights.cpu())
    assert_bitwise_equal(ours != 0, expected != 0, "experts")
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=1e-7)


def test_mixtral_block(device, instruction_set):
    """The whole layer: logits, route, moe_mlp; y and the gradient of every parameter."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=40, intermediate_size=56, num_local_experts=8, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(block.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed, scale=parameter.shape[-1] ** -0.5))
    x, gradient = randn(60, 40, seed=7), randn(60, 40, seed=8)

    def theirs(block, x):
        x = x.clone().requires_grad_()
        y = block(x[None])
        y = (y[0] if isinstance(y, tuple) else y).view(x.shape)
        parameters = [block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
        return y, *torch.autograd.grad(y, [x, *parameters], gradient.to(y.dtype))

    eager = theirs(block, x)
    leaves = [x, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    leaves = [place(leaf.detach().clone(), device).requires_grad_() for leaf in leaves]
    oracle = theirs(block.double(), x.double())
    weights, experts = moe_ops.route(F.linear(leaves[0], leaves[1]), 2, renormalize=True, eps=0.0)
    y = moe_ops.moe_mlp(leaves[0], weights, experts, leaves[2], leaves[3])
    ours = y, *torch.autograd.grad(y, leaves, place(gradient, device))
    for what, a, b, c in zip(("y", "x", "gate", "w_in", "w_out"), ours, eager, oracle, strict=True):
        assert_as_accurate(a, b, c, what)
