"""Routers of transformers that moe_ops.route can say, found by measuring.

A router has no plug-in point, and there are dozens of classes of it. What one computes is found on a copy of it with
random numbers: the logits and the weights it returns are compared with those of every option of route. A router that
none of them gives, that draws noise in training, that changes a buffer, that takes more than tokens and a bias for the
choice, or that returns something else, is left alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import ops
from moe_ops.integrations.transformers.report import Report

TOKENS = 64
NAMES = ("Gate", "Gating")  # are routers where they stand beside experts; what says Router in its name always is
GROUPS, TOP_GROUPS = ("n_group", "num_group", "num_groups"), ("topk_group", "top_groups")
LEAST = ("norm_min", "moe_norm_min")
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))


class Said(NamedTuple):
    """A router in the options of route."""

    top_k: int
    linear: str  # the submodule with weight [E, H]; "" for the router itself
    bias: str | None  # the buffer or parameter [E] that is added for the choice, or the argument it comes by
    argument: bool  # whether it comes by an argument
    options: tuple[tuple[str, Any], ...]
    dtypes: tuple[tuple[Any, ...], ...]  # of tokens, of weight -> of logits, of weights


def replace_routers(model: Any, report: Report) -> None:
    """Lets route compute in the place of every router of the model that it can say."""
    for name, router in _routers(model):
        linear = _linear(router)
        said = "has more than one linear layer" if linear is None else measure(router, linear)
        if isinstance(said, str):
            report.left[name or type(router).__name__] = said
            continue
        router._moe_ops_said, router._moe_ops_forward = said, router.forward
        router.forward = functools.partial(_forward, router)  # a bound method would not unpickle
        options = ", ".join(f"{key}={value!r}" for key, value in said.options)
        bias = "" if said.bias is None else f", selection_bias={said.bias}"
        report.replaced[name or type(router).__name__] = f"route(top_k={said.top_k}, {options}{bias})"


def _routers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Those that are not replaced yet, without what routers are made of."""
    within: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if any(name.startswith(f"{outer}.") for outer in within) or hasattr(module, "_moe_ops_said"):
            continue
        around = model.get_submodule(name.rpartition(".")[0])
        beside = any("Expert" in type(other).__name__ for other in around.children() if other is not module)
        if "Router" in kind or (kind.endswith(NAMES) and beside):
            within.append(name)
            yield name, module


def measure(router: torch.nn.Module, linear: str) -> Said | str:
    """The router in options of route, or why there are none."""
    taken = [p for p in inspect.signature(router.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    biases = [p.name for p in taken[1:2] if "bias" in p.name]
    if sum(p.default is p.empty for p in taken) > 1 + len(biases):
        return "takes more than the tokens"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        router, tokens = _with_numbers(router, linear)
        experts = _experts(router, linear)
        given = {name: 0.05 * torch.randn(experts) for name in biases}
        kept = [buffer.clone() for buffer in router.buffers()]
        try:
            found = [mode(_shaped(router, tokens, given), **given) for mode in (router.eval(), router.train(), router)]
            if not all(_is_triple(result, router.get_submodule(linear)) for result in found):
                return "does not return logits, weights and ids"
            if not all(map(torch.equal, kept, router.buffers())):
                return "changes its buffers"
            if any(not torch.equal(found[0][1], other[1]) for other in found[1:]):
                return "computes otherwise in training"
            logits, weights, ids = found[0]
            if not torch.allclose(_logits(router, linear, tokens, torch.float32), logits, rtol=1e-5, atol=1e-5):
                return "its logits are more than a linear layer"
            match = _match(router, linear, given, logits, weights, ids)
            if match is None:
                return "no option of route gives its weights"
            dtypes = tuple(_dtypes(router, linear, tokens, given))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            return f"does not run on tokens alone ({type(error).__name__})"
    return Said(ids.shape[-1], linear, match[0], match[0] in given, match[1], dtypes)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    said: Said = self._moe_ops_said
    weight = self.get_submodule(said.linear).weight
    kind = next((row[2:] for row in said.dtypes if row[:2] == (hidden_states.dtype, weight.dtype)), None)
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    if len(given) != said.argument or kind is None:
        return self._moe_ops_forward(hidden_states, *args, **kwargs)
    logits = _logits(self, said.linear, hidden_states.reshape(-1, weight.shape[1]), kind[0])
    bias = None
    if said.bias is not None:
        bias = (given[0] if said.argument else _named(self, said.bias)).reshape(-1)
    weights, experts = ops.route(logits, said.top_k, selection_bias=bias, **dict(said.options))
    return logits, weights.to(kind[1]), experts.long()


def _shaped(router: torch.nn.Module, tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Tokens [TOKENS, H], or [1, TOKENS, H] for a router that takes nothing else."""
    try:
        router(tokens, **given)
    except ValueError:
        return tokens[None]
    return tokens


def _logits(router: Any, linear: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    layer = router.get_submodule(linear)
    bias = getattr(layer, "bias", None)
    return F.linear(x.to(dtype), layer.weight.to(dtype), None if bias is None else bias.to(dtype))


def _match(
    router: Any, linear: str, given: dict[str, Tensor], logits: Tensor, weights: Tensor, ids: Tensor
) -> tuple[str | None, tuple[tuple[str, Any], ...]] | None:
    """The name of the bias and the options that give these weights."""
    dense = torch.zeros(logits.shape, dtype=torch.float64)
    theirs = dense.scatter(1, ids, weights.double())
    chosen = dense.scatter(1, ids, 1.0)
    biases: list[str | None] = [None, *given, *_per_expert(router, linear)]
    for bias, options in itertools.product(biases, _candidates(router)):
        try:
            said_bias = None
            if bias is not None:
                said_bias = (given[bias] if bias in given else _named(router, bias)).reshape(-1)
            ours, experts = ops.route(logits.float(), ids.shape[-1], selection_bias=said_bias, **options)
        except ValueError:
            continue  # groups that cannot hold top_k
        if not torch.equal(dense.scatter(1, experts.long(), 1.0), chosen):
            continue
        mine = dense.scatter(1, experts.long(), ours.double())
        scale = float((theirs.sum() / mine.sum()).float())
        if torch.allclose(mine * scale, theirs, rtol=4e-6, atol=1e-12):
            rounded = float(f"{scale:.5g}")
            return bias, (*options.items(), ("scale", rounded if abs(rounded - scale) <= 2e-6 * scale else scale))
    return None


def _candidates(router: Any) -> Iterator[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{}]
    count, kept = (
        next((getattr(router, n) for n in names if hasattr(router, n)), None) for names in (GROUPS, TOP_GROUPS)
    )
    if isinstance(count, int) and isinstance(kept, int) and count > 1:
        for score, mask in itertools.product(("top2_sum", "max"), ("-inf", "zero")):
            groups.append({"groups": (count, kept), "group_score": score, "group_mask": mask})
    sums: list[dict[str, Any]] = [{}, *({"renormalize": True, "eps": eps} for eps in (1e-20, 1e-12, 1e-9, 1e-6))]
    least = next((getattr(router, name) for name in LEAST if hasattr(router, name)), None)
    if least is not None:
        sums.append({"renormalize": "clamp", "eps": float(least)})
    for score in ("softmax", "sigmoid", "sqrtsoftplus", "softmax_selected"):
        for group, renormalize in itertools.product(groups, sums):
            yield {"score": score, **group, **renormalize}


def _dtypes(router: Any, linear: str, tokens: Tensor, given: dict[str, Tensor]) -> Iterator[tuple[torch.dtype, ...]]:
    tokens = _shaped(router, tokens, given)
    for of_tokens, of_weight in DTYPES:
        layer = router.get_submodule(linear)
        layer.weight.data = layer.weight.data.to(of_weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.data = layer.bias.data.to(of_weight)
        try:
            logits, weights, _ = router(tokens.to(of_tokens), **given)
        except RuntimeError:
            continue  # transformers does not run it so either
        x = tokens.reshape(-1, tokens.shape[-1]).to(of_tokens)
        if torch.allclose(_logits(router, linear, x, logits.dtype), logits, rtol=1e-5, atol=1e-5):
            yield of_tokens, of_weight, logits.dtype, weights.dtype


def _with_numbers(router: torch.nn.Module, linear: str) -> tuple[torch.nn.Module, Tensor]:
    """A copy on the CPU in float32 with random values, and tokens [TOKENS, H], half of which have very small scores."""
    hooks = (v for m in router.modules() for name, v in vars(m).items() if name.endswith("_hooks"))
    without = {id(each): type(each)() for each in hooks}  # theirs is not to see these numbers
    router = copy.deepcopy(router, without).to_empty(device="cpu").float()
    for value in itertools.chain(router.parameters(), router.buffers()):
        if value.is_floating_point():
            value.data.normal_(std=0.05)
    weight: Any = router.get_submodule(linear).weight
    shared = torch.randn(weight.shape[1])
    weight.data = torch.randn_like(weight) / weight.shape[1] ** 0.5 + shared / shared.norm()
    tokens = torch.randn(TOKENS, weight.shape[1])
    tokens[::2] -= 12 * shared / shared.norm()
    return router, tokens


def _is_triple(result: Any, layer: Any) -> bool:
    if not isinstance(result, tuple) or len(result) != 3 or not all(isinstance(t, Tensor) for t in result):
        return False
    logits, weights, ids = result
    whole = ids.dtype == torch.int64 and weights.is_floating_point()
    return whole and logits.shape == (TOKENS, layer.weight.shape[0]) and weights.shape == ids.shape and ids.dim() == 2


def _linear(router: torch.nn.Module) -> str | None:
    weight = getattr(router, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        return ""
    layers = [name for name, module in router.named_modules() if type(module) is torch.nn.Linear]
    return layers[0] if len(layers) == 1 else None


def _experts(router: Any, linear: str) -> int:
    return int(router.get_submodule(linear).weight.shape[0])


def _per_expert(router: Any, linear: str) -> list[str]:
    experts, own = _experts(router, linear), f"{linear}.bias".lstrip(".")
    values = itertools.chain(router.named_parameters(), router.named_buffers())
    return [name for name, value in values if value.numel() == experts and value.dim() <= 2 and name != own]


def _named(router: Any, name: str) -> Tensor:
    module, _, attribute = name.rpartition(".")
    return getattr(router.get_submodule(module), attribute)
