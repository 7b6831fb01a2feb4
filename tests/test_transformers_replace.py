"""replace: models that are no plug-in, before and after; and enable(router=True)."""

import copy
import pickle

import pytest
import torch

from transformers_models import TINY, assert_same_gradients, draw, ids, logits_and_gradients, tiny_model

pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed (extra [transformers])")

from moe_ops.integrations.transformers import enable, replace

TOLERANCE = 5e-6


def seq2seq(name):
    """Logits and gradients are asked of an encoder and decoder given the same tokens."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    sizes = {
        "vocab_size": TINY["vocab_size"], "d_model": 32, "d_ff": 24, "d_kv": 8, "num_heads": 4, "num_layers": 2,
        "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_sparse_step": 1, "decoder_sparse_step": 1,
        "expert_capacity": 5, "decoder_start_token_id": 0, "pad_token_id": 0, "moe_token_dropout": 0.2,
    }  # fmt: skip
    kind = type(AutoConfig.for_model(name))
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(kind(**{k: v for k, v in sizes.items() if hasattr(kind(), k)})).eval()
    return draw(model)


def dbrx():
    from transformers import DbrxConfig, DbrxForCausalLM

    torch.manual_seed(0)
    ffn = {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=128, ffn_config=ffn, attn_config=attention
    )
    return draw(DbrxForCausalLM(config).eval())


class Twice(torch.nn.Module):
    """An encoder and decoder as logits_and_gradients calls a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, use_cache):
        return self.model(input_ids=tokens, decoder_input_ids=tokens, use_cache=use_cache)


MODELS = {
    "dbrx": dbrx,
    "llama4_text": lambda: tiny_model("llama4_text", interleave_moe_layer_step=1),
    "longcat_flash": lambda: tiny_model("longcat_flash", zero_expert_num=4, num_layers=1),
    "jetmoe": lambda: tiny_model("jetmoe", kv_channels=8),
    "switch_transformers": lambda: Twice(seq2seq("switch_transformers")),
    "nllb-moe": lambda: Twice(seq2seq("nllb-moe")),
}


@pytest.mark.parametrize("name", MODELS)
def test_replace(name):
    """Logits and the gradients of all parameters that kept their names, and of the stacked ones as a sum."""
    model, tokens = MODELS[name](), ids()
    eager, eager_gradients = logits_and_gradients(model, tokens)
    assert eager.std() > 1e-3
    before = sum(parameter.numel() for parameter in model.parameters())
    report = replace(model)
    assert report.replaced, report
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    ours, gradients = logits_and_gradients(model, tokens)
    torch.testing.assert_close(ours, eager, rtol=0, atol=TOLERANCE)
    largest = max(value.abs().max().item() for value in eager_gradients.values())
    same = eager_gradients.keys() & gradients.keys()
    assert len(same) > len(gradients) / 2
    for key in same:
        atol = TOLERANCE * max(eager_gradients[key].abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(
            gradients[key], eager_gradients[key], rtol=0, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )
    # What lies otherwise now: the same numbers, so the same norm.
    theirs = sum(v.double().square().sum() for k, v in eager_gradients.items() if k not in same)
    mine = sum(v.double().square().sum() for k, v in gradients.items() if k not in same)
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-5, atol=0)
    again = replace(model)
    assert not again.replaced and set(again.left.values()) >= {"was replaced before"}


def test_replace_is_used():
    """A wrong weight is seen."""
    model, tokens = dbrx(), ids()
    replace(model)
    with torch.no_grad():
        before = model(tokens).logits
        model.get_submodule("transformer.blocks.0.ffn.experts").w_out.mul_(1.01)
        assert (model(tokens).logits - before).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("limit", [None, 0.5])
def test_step3p7(limit):
    from types import SimpleNamespace

    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = SimpleNamespace(num_local_experts=8, hidden_size=24, moe_intermediate_size=20, hidden_act="silu")
    theirs = draw(torch.nn.Sequential(Step3p7Experts(config, limit)))
    ours = copy.deepcopy(theirs)
    assert "0" in replace(ours).replaced
    x, chosen, weights = torch.randn(40, 24), torch.rand(40, 8).topk(3).indices, torch.rand(40, 3)
    results = []
    for experts in (ours[0], theirs[0]):
        y = experts(x, chosen, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(experts.parameters()))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


def test_replace_leaves_plugins():
    model = tiny_model("mixtral")
    report = replace(model)
    assert not report.replaced
    assert all("set_experts_implementation" in why for why in report.left.values()) and len(report.left) == 2
    with pytest.raises(TypeError, match=r"transformers\.replace: model must be a torch\.nn\.Module, got str"):
        replace("mixtral")


ROUTERS = {
    "mixtral": True, "qwen2_moe": True, "qwen3_moe": True, "olmoe": True, "granitemoe": True, "gpt_oss": True,
    "jamba": True, "deepseek_v2": True, "deepseek_v3": True, "glm4_moe": True, "dots1": True, "phimoe": False,
    "gemma4_text": False,
}  # fmt: skip


@pytest.mark.parametrize("name, said", ROUTERS.items())
def test_routers(name, said):
    """enable(model, router=True): the same logits and gradients; routers that route cannot say are left alone."""
    model, tokens = tiny_model(name), ids()
    enable()
    model.set_experts_implementation("eager")
    eager, eager_gradients = logits_and_gradients(model, tokens)
    report = enable(model, router=True)
    assert bool(report.replaced) == said, report
    assert said or report.left
    ours, gradients = logits_and_gradients(model, tokens)
    torch.testing.assert_close(ours, eager, rtol=0, atol=TOLERANCE)
    assert_same_gradients(tiny_model(name), tokens, gradients, eager_gradients, TOLERANCE)


def test_a_model_with_replaced_routers_can_be_pickled():
    model = tiny_model("mixtral")
    assert enable(model, router=True).replaced
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    routers = [module for module in again.modules() if hasattr(module, "_moe_ops_said")]
    assert routers and all(router.forward.args == (router,) for router in routers)


def test_routers_of_new_models():
    report = enable(router=True)
    try:
        tiny_model("mixtral")
    finally:
        enable()
    assert len(report.replaced) >= 1 and "renormalize=True" in str(report)
    with pytest.raises(TypeError, match=r"transformers\.enable: router must be True or False"):
        enable(router=1)
