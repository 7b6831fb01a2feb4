"""Every router family of transformers, said in route's options, against a few lines of that model's own routing."""

import pytest
import torch
import torch.nn.functional as F

import moe_ops
from accuracy import assert_as_accurate, assert_bitwise_equal, place
from cases import randn, seeded

TOKENS, EXPERTS, TOP_K = 80, 32, 4
BIAS = randn(EXPERTS, seed=7, scale=0.1)
PER_EXPERT = randn(EXPERTS, seed=8).abs() + 0.5


def softmax_top_k(logits, k):
    return torch.topk(torch.softmax(logits, -1), k)


def mixtral(logits):
    w, i = softmax_top_k(logits, TOP_K)
    return w / w.sum(-1, keepdim=True), i


def qwen_without_norm(logits):
    return softmax_top_k(logits, TOP_K)


def granite(logits):
    top, i = torch.topk(logits, TOP_K)
    return torch.softmax(top, -1), i


def cohere_sigmoid(logits):
    top, i = torch.topk(logits, TOP_K)
    w = torch.sigmoid(top)
    return w / w.sum(-1, keepdim=True), i


def kept_groups(group_scores, groups, top_groups):
    mask = torch.zeros_like(group_scores).scatter_(1, torch.topk(group_scores, top_groups)[1], 1)
    return mask.repeat_interleave(EXPERTS // groups, 1).bool()


def deepseek_v2_group_limited(logits):
    scores = torch.softmax(logits, -1)
    mask = kept_groups(scores.view(-1, 8, 4).max(-1).values, 8, 3)
    w, i = torch.topk(scores.masked_fill(~mask, 0.0), TOP_K)
    return w * 16.0, i


def deepseek_v3(logits, k=TOP_K, groups=8, top_groups=4, scale=2.5, norm=True):
    scores = torch.sigmoid(logits)
    choice = scores + BIAS.to(logits.dtype)
    mask = kept_groups(choice.view(-1, groups, EXPERTS // groups).topk(2, -1)[0].sum(-1), groups, top_groups)
    i = torch.topk(choice.masked_fill(~mask, float("-inf")), k)[1]
    w = scores.gather(1, i)
    return (w / (w.sum(-1, keepdim=True) + 1e-20) if norm else w) * scale, i


def mistral4(logits):
    scores = torch.softmax(logits, -1)
    mask = kept_groups(scores.view(-1, 4, 8).topk(2, -1)[0].sum(-1), 4, 2)
    i = torch.topk(scores.masked_fill(~mask, 0.0), TOP_K)[1]
    w = scores.gather(1, i)
    return w / (w.sum(-1, keepdim=True) + 1e-20) * 1.5, i


def biased(logits, score, finish):
    """Sigmoid-like scores, a bias that chooses, and what becomes of the chosen scores."""
    scores = score(logits)
    i = torch.topk(scores + BIAS.to(logits.dtype), TOP_K)[1]
    return finish(scores.gather(1, i)), i


def over_sum(eps, scale=1.0):
    return lambda w: w / (w.sum(-1, keepdim=True) + eps) * scale


def deepseek_v4(logits):
    return biased(logits, lambda z: F.softplus(z, threshold=100).sqrt(), over_sum(1e-20, 1.5))


def ernie(logits):
    return biased(logits, lambda z: z.softmax(-1), lambda w: w / w.sum(-1, keepdim=True).clamp(min=0.2))


def longcat(logits):
    return biased(logits, lambda z: z.softmax(-1), lambda w: w * 6.0)


def gemma4(logits):
    w, i = softmax_top_k(logits, TOP_K)
    return w / w.sum(-1, keepdim=True) * PER_EXPERT.to(logits.dtype)[i], i


def llama4(logits):
    top, i = torch.topk(logits, 1)
    return torch.full_like(logits, float("-inf")).scatter(1, i, top).sigmoid().gather(1, i), i


def dbrx(p):
    def transcription(logits):
        w, i = softmax_top_k(logits, TOP_K)
        return w / torch.norm(w, p=p, dim=-1, keepdim=True), i

    return transcription


def switch(logits):
    w, i = torch.softmax(logits, -1).max(-1, keepdim=True)
    return w, i


def nllb(logits):
    w, i = softmax_top_k(logits, 2)
    return w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps), i


def inkling_scores(logits):
    """The routed part of a joint choice: sigmoid scores, normalised as softmax of log-sigmoid over the chosen."""
    return biased(logits, torch.sigmoid, lambda w: torch.softmax(w.log(), -1))


def grok(logits):
    return softmax_top_k(30 * torch.tanh(logits / 30), TOP_K)


SIGMOID = {"score": "sigmoid", "selection_bias": BIAS}
NOAUX = SIGMOID | {"groups": (8, 4), "renormalize": True, "scale": 2.5}

# name: (the models that route so, route's options, transcription)
FAMILIES = {
    "mixtral": ("mixtral minimax phi qwen2_moe/qwen3_moe/olmoe/flex_olmo/qwen3_next/mellum/hunyuan with norm_topk_prob",
                {"renormalize": True, "eps": 0.0}, mixtral),
    "qwen2_moe": ("qwen2_moe qwen3_moe olmoe jamba deepseek_v2 (greedy), without norm", {}, qwen_without_norm),
    "granitemoe": ("granitemoe gpt_oss aria cohere2_moe jetmoe openai_privacy_filter",
                   {"score": "softmax_selected"}, granite),
    "cohere2_moe_sigmoid": ("cohere2_moe flint", {"score": "sigmoid", "renormalize": True, "eps": 0.0}, cohere_sigmoid),
    "deepseek_v2_group_limited": ("deepseek_v2 deepseek_ocr2 unlimited_ocr",
                                  {"groups": (8, 3), "group_score": "max", "group_mask": "zero", "scale": 16.0},
                                  deepseek_v2_group_limited),
    "deepseek_v3": ("deepseek_v3 glm4_moe dots1 solar_open exaone_moe kimi_linear nemotron_h mimo_v2_flash", NOAUX,
                    deepseek_v3),
    "deepseek_v3_without_norm": ("the same with norm_topk_prob=False", NOAUX | {"renormalize": False},
                                 lambda z: deepseek_v3(z, norm=False)),
    "glm4_moe_one_group": ("glm4_moe afmoe with n_group=1", NOAUX | {"groups": (1, 1)},
                           lambda z: deepseek_v3(z, groups=1, top_groups=1)),
    "mistral4": ("mistral4 mistral_large4",
                 {"groups": (4, 2), "group_mask": "zero", "renormalize": True, "scale": 1.5}, mistral4),
    "deepseek_v4": ("deepseek_v4 inkling2", SIGMOID | {"score": "sqrtsoftplus", "renormalize": True, "scale": 1.5},
                    deepseek_v4),
    "minimax_m2": ("minimax_m2 minimax_m3_vl laguna kolibri1 step3p7", SIGMOID | {"renormalize": True, "eps": 0.0},
                   lambda z: biased(z, torch.sigmoid, over_sum(0.0))),
    "lfm2_moe": ("lfm2_moe", SIGMOID | {"renormalize": True, "eps": 1e-6, "scale": 1.2},
                 lambda z: biased(z, torch.sigmoid, over_sum(1e-6, 1.2))),
    "muse_spark": ("muse_spark hy_v3", SIGMOID | {"renormalize": True, "eps": 1e-15, "scale": 2.0},
                   lambda z: biased(z, torch.sigmoid, over_sum(1e-15, 2.0))),
    "inkling_routed": ("inkling, its routed experts alone", SIGMOID | {"renormalize": True, "eps": 0.0},
                       inkling_scores),
    "ernie4_5_moe": ("ernie4_5_moe ernie4_5_vl_moe",
                     {"selection_bias": BIAS, "renormalize": "clamp", "eps": 0.2}, ernie),
    "longcat_flash": ("longcat_flash zaya", {"selection_bias": BIAS, "scale": 6.0}, longcat),
    "gemma4": ("gemma4 diffusion_gemma", {"renormalize": True, "eps": 0.0, "expert_scale": PER_EXPERT}, gemma4),
    "llama4": ("llama4", {"score": "sigmoid", "top_k": 1}, llama4),
    "dbrx": ("dbrx", {"renormalize": "pnorm", "p": 1.0}, dbrx(1)),
    "dbrx_p2": ("dbrx", {"renormalize": "pnorm", "p": 2.0}, dbrx(2)),
    "switch_transformers": ("switch_transformers", {"top_k": 1}, switch),
    "nllb_moe": ("nllb_moe", {"top_k": 2, "renormalize": "clamp", "eps": 2**-23}, nllb),
    "grok": ("routers with a soft cap on their logits", {"softcap": 30.0}, grok),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, dtype, device, instruction_set):
    _, options, transcription = FAMILIES[name]
    options = {n: place(v, device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    top_k = options.pop("top_k", TOP_K)
    # distinct within a token (torch.topk breaks ties as it likes), and exact in bfloat16
    numbers = torch.rand(TOKENS, 256, generator=seeded()).argsort(1)[:, :EXPERTS]
    logits = ((numbers - 128) / 32).to(dtype)
    gradient = randn(TOKENS, top_k, seed=6)

    def run(function, leaf, compute):
        leaf = leaf.requires_grad_()
        weights, experts = function(leaf.to(compute))
        return weights, experts, torch.autograd.grad(weights, leaf, place(gradient, leaf.device).to(weights.dtype))[0]

    ours = run(lambda z: moe_ops.route(z, top_k, **options), place(logits.clone(), device), dtype)
    eager = run(transcription, logits.clone(), torch.float32)
    oracle = run(transcription, logits.double(), torch.float64)
    assert_bitwise_equal(ours[1].long(), oracle[1], "experts")
    assert_as_accurate(ours[0], eager[0], oracle[0], "weights")
    assert_as_accurate(ours[2], eager[2], oracle[2], "grad logits")
