"""Tiny models of transformers' MoE families, with random weights, and what they compute: logits and all gradients."""

import contextlib
import copy
import inspect
from types import SimpleNamespace

import torch

from accuracy import assert_as_accurate
from transformers_families import CLASSES, TINY, module_of, tiny_config

TOLERANCE = 5e-6  # of the largest absolute value, in float32


@contextlib.contextmanager
def one_thread():
    """For models so small that a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Permissive(SimpleNamespace):
    """A config that an experts class can be built from alone."""

    hidden_size = moe_hidden_size = 24
    hidden_act, hidden_activation, mlp_hidden_act = "silu", "gelu_pytorch_tanh", "relu2"
    num_experts = num_local_experts = n_routed_experts = moe_num_experts = 8
    moe_intermediate_size = intermediate_size = 20
    swiglu_limit, swiglu_alpha, mlp_gate_softcap, mlp_up_softcap = 1.0, 1.702, 2.0, 2.0
    post_norm_eps, moe_latent_size = 1e-5, None
    _experts_implementation = "eager"


def tiny_model(family, dtype=torch.float32):
    """The model of a small config, every parameter drawn, on transformers' eager experts.

    In bfloat16 it is as from_pretrained makes it: what the model keeps in float32 stays there.
    """
    torch.manual_seed(0)
    model = getattr(module_of(family), CLASSES[family])._from_config(tiny_config(family), dtype=dtype).eval()
    if any(hasattr(module, "_is_expert_parallel") for module in model.modules()):
        model.set_experts_implementation("eager")
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype == torch.bfloat16 and any(part in name for part in kept):
            value.data = value.data.float()
    return draw(model)


def exact(model):
    """A copy in float64, or in float32 where the model's own code does not run in float64."""
    try:
        wide = copy.deepcopy(model).double()
        logits_of(wide, ids(1, 3))
    except RuntimeError:
        wide = copy.deepcopy(model).float()
    return wide


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


def ids(rows=2, length=17, seed=2):
    return torch.randint(3, TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens):
    decoder = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    torch.manual_seed(0)  # a diffusion model draws what it starts from
    return model(input_ids=tokens, use_cache=False, **decoder).logits


def logits_and_gradients(model, tokens):
    """Logits, and the gradient of every parameter that has one, by name, for a fixed outgoing gradient."""
    return backward(model, logits_of(model, tokens))


def backward(model, logits):
    model.zero_grad(set_to_none=True)
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits.backward(gradient.to(logits.dtype) / logits.shape[1])
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def greedy_text(model, tokens):
    """The ids that the model generates, or None where it generates no text."""
    if not model.can_generate():
        return None
    torch.manual_seed(0)
    text = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return getattr(text, "sequences", text)


def logits_and_choices(model, tokens):
    """Logits, and which experts the tokens choose, call by call: what experts are told or, where none are, what routers
    return."""
    found, hooks = [], []

    def keep(tensors):
        for value in tensors:
            if isinstance(value, torch.Tensor):
                found.append(value.clone() if value.dtype == torch.int64 else value != 0)

    told = [m for m in model.modules() if "top_k_index" in inspect.signature(type(m).forward).parameters]
    for module in told:
        hooks.append(module.register_forward_pre_hook(lambda _, args: keep(args[1:2])))
    for module in model.modules():
        if not told and type(module).__name__.endswith(("Router", "TopKGating")):
            hooks.append(module.register_forward_hook(lambda _, args, output: keep(output)))
    logits = logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    assert found
    return logits, found


def same_choices(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_same(family, tokens, ours, eager):
    """Two results of logits_and_gradients: each tensor up to TOLERANCE of its largest value. Where a model is so
    ill-conditioned that float32 itself does not hold that (Gemma 4's norms), ours is held to the accuracy law."""
    ours, eager = ({"logits": logits, **gradients} for logits, gradients in (ours, eager))
    assert ours.keys() == eager.keys()
    largest = max(value.abs().max().item() for key, value in eager.items() if key != "logits")
    wide = None
    for key, value in eager.items():
        floor = 0.0 if key == "logits" else 1e-2 * largest  # a router's gradient may cancel to noise
        allowed = TOLERANCE * max(min(value.abs().max().item(), 1.0 if key == "logits" else torch.inf), floor)
        if (ours[key] - value).abs().max() <= allowed:
            continue
        if wide is None:
            logits, gradients = logits_and_gradients(tiny_model(family).double(), tokens)
            wide = {"logits": logits, **gradients}
        assert_as_accurate(ours[key], value, wide[key], key, norms=("rms",))


def assert_bfloat16(family, serve, draws=6):
    """Logits and all gradients of the model in bfloat16, and of what `serve` makes of it, by the accuracy law.

    The law is that of continuous functions: token ids are drawn until there are a few draws on which all three runs
    choose the same experts. Few tokens, so that no indexer of sparse attention has anything to choose either.
    """
    eager = tiny_model(family, torch.bfloat16)
    oracle = exact(eager)
    ours = copy.deepcopy(eager)
    serve(ours)
    models = (ours, eager, oracle)
    results = []
    for seed in range(100, 200):
        tokens = ids(1, 5, seed)
        logits, chosen = zip(*(logits_and_choices(model, tokens) for model in models), strict=True)
        if all(same_choices(chosen[0], other) for other in chosen[1:]):
            results.append([backward(model, value) for model, value in zip(models, logits, strict=True)])
        if len(results) == draws:
            break
    assert len(results) == draws

    def stacked(pick):
        return [torch.stack([pick(result[which]) for result in results]) for which in range(3)]

    assert_as_accurate(*stacked(lambda result: result[0]), "logits")
    names = [name for name in results[0][1][1] if all(name in result[0][1] for result in results)]
    gradients = {name: stacked(lambda result, name=name: result[1][name]) for name in names}
    # Over so few values the largest error is chance: of each gradient the mean one is held to the law, and of all of
    # them together, each in units of its own, the largest too.
    largest = max(values[2].abs().max() for values in gradients.values())
    for name, values in gradients.items():
        assert_as_accurate(*values, name, norms=("rms",))
    units = {name: max(values[2].abs().max(), 1e-2 * largest) for name, values in gradients.items()}
    together = [torch.cat([(gradients[n][i] / units[n]).flatten() for n in names]) for i in range(3)]
    assert_as_accurate(*together, "all gradients")
