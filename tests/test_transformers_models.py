"""Tiny models of every family of transformers whose experts are a plug-in, as a whole, on moe_ops and on eager."""

import re

import pytest
import torch

from transformers_families import CLASSES, experts_classes
from transformers_models import (
    TOLERANCE,
    assert_bfloat16,
    assert_same,
    greedy_text,
    ids,
    logits_and_gradients,
    logits_of,
    one_thread,
    tiny_model,
)

pytest.importorskip("transformers", minversion="5.23", reason="transformers is not installed (extra [transformers])")

from moe_ops.integrations.transformers import enable

pytestmark = pytest.mark.long_emulated
FAMILIES = sorted({family for family, _ in experts_classes()} & CLASSES.keys())
# Those that differ in their experts, in bfloat16 in every run; the others with --long.
USUAL = {"aria", "deepseek_v3", "gemma4", "gpt_oss", "inkling2", "mixtral", "muse_spark", "nemotron_h", "qwen3_moe"}
# Routers that route cannot compute, and the report's reason.
LEFT_ALONE = {
    "deepseek_v4": "takes more than the tokens",  # those of its first layers: a hash of the token's id
    "diffusion_gemma": "its logits are more than a linear layer",
    "gemma4": "its logits are more than a linear layer",
    "inkling": "does not return logits, weights and ids",  # but the shared experts' weights as well
    "kolibri1": "no option of route gives its weights",
    "muse_spark": "its logits are more than a linear layer",
    "phimoe": "computes otherwise in training",
    "zaya": "has more than one linear layer",
}


@pytest.fixture(autouse=True)
def enabled():
    enable()
    with one_thread():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_model(family, record_property):
    """Logits, all gradients and greedy generation, in float32 against eager; one wrong weight must be seen."""
    model, tokens = tiny_model(family), ids()
    eager = logits_and_gradients(model, tokens)
    text = greedy_text(model, tokens)
    model.set_experts_implementation("moe_ops")
    assert_same(family, tokens, logits_and_gradients(model, tokens), eager)
    assert text is None or torch.equal(greedy_text(model, tokens), text)
    record_property("class", type(model).__name__)
    record_property("text", "no head for text" if text is None else "yes")
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "_is_expert_parallel"):
                module.down_proj.neg_()
        assert (logits_of(model, tokens) - eager[0]).abs().max() > 10 * TOLERANCE * min(1, eager[0].abs().max())


@pytest.mark.parametrize(
    "family", [family if family in USUAL else pytest.param(family, marks=pytest.mark.long) for family in FAMILIES]
)
def test_bfloat16(family):
    assert_bfloat16(family, lambda model: model.set_experts_implementation("moe_ops"))


def options_of(said):
    """The options of route without what a config sets: top_k, the number of groups, and scale."""
    said = re.sub(r"top_k=\d+, |, scale=[\d.]+", "", said)
    said = re.sub(r"groups=\(\d+, \d+\)", "groups", said)
    said = re.sub(r"selection_bias=[\w.]+", "selection_bias", said)
    return f"`{said}`"


@pytest.mark.parametrize("family", FAMILIES)
def test_routers(family, record_property):
    """enable(model, router=True): the same logits and gradients; routers that route cannot say are left alone."""
    model, tokens = tiny_model(family), ids()
    eager = logits_and_gradients(model, tokens)
    report = enable(model, router=True)
    assert set(report.left.values()) == {LEFT_ALONE[family]} if family in LEFT_ALONE else not report.left, report
    why = sorted(set(report.left.values()))
    assert bool(report.replaced) == (family not in LEFT_ALONE or family == "deepseek_v4")
    record_property("router", "route" if report.replaced else "left alone")
    record_property("options", "; ".join([*sorted(map(options_of, set(report.replaced.values()))), *why]))
    assert_same(family, tokens, logits_and_gradients(model, tokens), eager)
