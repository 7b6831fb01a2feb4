"""RouterHealth: how the experts of every layer are used, from counts that route returns anyway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks, nn
from moe_ops.monitor import routers
from moe_ops.monitor.layer import Layer, LayerSummary, total
from moe_ops.nn.router_base import segment_counts
from moe_ops.types import NoisyRouteResult, RouteResult


class RouterHealth:
    """Load, entropy, dead experts, drops and logits of every router of a model, summed until they are read.

        health = RouterHealth(model)
        for batch in batches:
            train_step(batch)
            health.step()                      # closes a step of the history that plot draws
        print(health.table())

    Counts come from `moe_ops.route`'s statistics, in the pass over the logits that it makes anyway; sums stay on the
    device, and nothing waits for it before a figure is read. Routers of transformers' models are seen through the ids
    that their experts are given, and layers that `integrations.transformers.replace` put in before likewise: counted,
    but without logits. Evaluation counts too: `pause()` leaves it out. Under activation checkpointing a router is
    called twice and counts twice, which changes no share.

    Args:
        model: watches all its routers by hooks until `detach()`; None: `update` is called by hand.
        classes: names of token classes (parts of speech, languages, ...), whose loads are kept apart; each forward then
            stands within `with health.token_classes(ids):`.
        coactivation: also counts which pairs of experts are chosen by one token, [E, E] per layer: a pass over the ids.
        group: figures are those of all ranks of this process group together, summed on the host when they are read:
            every rank must then read the same ones in the same order. A rank that has not seen a layer adds nothing to
            it. None: those of this process.

    Raises:
        TypeError, ValueError: an argument is wrong, or the model has no router.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        *,
        classes: Sequence[str] = (),
        coactivation: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        module_checks.instance("RouterHealth", "model", model, (torch.nn.Module, type(None)), "a Module or None")
        checks.flag("RouterHealth", "coactivation", coactivation)
        if isinstance(classes, str):
            raise TypeError(f"RouterHealth: classes must be a sequence of names, got the str {classes!r}")
        module_checks.group("RouterHealth", group)
        self.classes, self.coactivation, self.group = tuple(classes), coactivation, group
        self.layers: dict[str, Layer] = {}
        self._ids: Tensor | None = None
        self._paused = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._listening: list[tuple[list[Any], Any]] = []
        if model is not None:
            self._attach(model)

    def update(
        self,
        name: str,
        route: RouteResult | NoisyRouteResult | tuple[Tensor, Tensor],
        num_experts: int | None = None,
        *,
        capacity: int | None = None,
        computing: int | None = None,
    ) -> None:
        """Adds what one router did to one batch.

        Args:
            name: of the layer.
            route: what a router returns with stats=True, or the pair (weights, experts) [T, K], whose ids are counted.
            num_experts: needed where route is a pair.
            capacity: rows an expert takes; slots beyond it count as dropped.
            computing: how many of the experts, from the first, have a capacity; None for all.

        Raises:
            TypeError, ValueError: num_experts is missing or wrong, or classes are kept and these tokens have none.
        """
        op = "RouterHealth.update"
        result = route if isinstance(route, (RouteResult, NoisyRouteResult)) else None
        if result is None:
            module_checks.pair(op, "route", route, "(weights, experts) or a RouteResult")
        experts = route[1]
        checks.ids(op, "experts", experts, "[tokens, k]", 2)
        if result is not None:
            num_experts = result.counts.shape[1]
        checks.integer(op, "num_experts", num_experts, 1, checks.MAX_INT32)
        assert num_experts is not None
        for size, value in (("capacity", capacity), ("computing", computing)):
            if value is not None:
                checks.integer(op, size, value, 0)
        num_classes = max(len(self.classes), 1)
        if name in self.layers and self.layers[name].num_experts != num_experts:
            had = self.layers[name].num_experts
            raise ValueError(f"{op}: num_experts must be {had} as before for {name!r}, got {num_experts}")
        # Sums made in inference mode could not be added to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if result is None or self.classes:
                counts = segment_counts(experts, num_experts, self._class_ids(experts), num_classes)
            else:
                counts = result.counts.sum(0, keepdim=True)
            layer = self.layers.get(name)
            if layer is None:
                layer = Layer(num_experts, num_classes, self.coactivation, counts.device)
                self.layers[name] = layer
            logsumexp = None if result is None else result.logsumexp
            layer.add(experts, counts, logsumexp, capacity, num_experts if computing is None else computing)

    @contextmanager
    def token_classes(self, ids: Tensor) -> Iterator[None]:
        """The classes of the tokens of forwards in here.

        Args:
            ids: integers of any shape, one per token; those outside the classes count nowhere.

        Raises:
            ValueError: RouterHealth was built without classes, or a forward has another number of tokens.
        """
        if not self.classes:
            raise ValueError("RouterHealth.token_classes: RouterHealth must be built with classes, got none")
        module_checks.instance("RouterHealth.token_classes", "ids", ids, (Tensor,), "a Tensor")
        self._ids = ids.reshape(-1)
        try:
            yield
        finally:
            self._ids = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forwards in here are not counted."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def step(self) -> None:
        """Closes a step of the history."""
        for layer in self.layers.values():
            layer.step()

    def reset(self) -> None:
        """Forgets all sums and the history."""
        self.layers.clear()

    def detach(self) -> None:
        """Takes the hooks off the model; what was counted stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for listeners, told in self._listening:
            listeners.remove(told)
        self._listening.clear()

    def summary(self) -> dict[str, LayerSummary]:
        """The figures of every layer; reading them waits for the device."""
        return {name: layer.summary() for name, layer in self.whole().items()}

    def together(self, name: str) -> Tensor:
        """[E, E] float64, how much likelier than by chance two experts are chosen by one token: 1 is chance, 0 never.

        Raises:
            ValueError: no such layer was seen, or RouterHealth was built without coactivation.
        """
        layer = self._layer("together", name, self.whole(pairs=True))
        if layer.together is None:
            raise ValueError("RouterHealth.together: RouterHealth must be built with coactivation=True")
        pairs = layer.together.double().cpu()
        share = pairs.diagonal() / max(layer.tokens, 1)
        expected = share[:, None] * share[None, :] * max(layer.tokens, 1)
        return torch.where(expected > 0, pairs / expected.clamp(min=1e-300), 0.0)

    def specialisation(self, name: str) -> Tensor:
        """[classes, E] float64, the share of a class's slots that an expert takes; rows sum to 1, to 0 without tokens.

        Raises:
            ValueError: no such layer was seen.
        """
        counts = self._layer("specialisation", name, self.whole()).by_class.double().cpu()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)

    def table(self) -> str:
        """A line per layer."""
        from moe_ops.monitor.show import table

        return table(self.summary())

    def plot(self, file: str) -> None:
        """Draws load and max/mean over the steps of every layer, and what the classes prefer, into an image file.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was counted yet.
        """
        from moe_ops.monitor.show import plot

        plot(self, file)

    def trainer_callback(self, report: Callable[[dict[str, float]], None] | None = None) -> Any:
        """A callback for transformers' Trainer: closes a step after each, adds figures to the logs, then forgets them.

        Args:
            report: is also called with the figures at every log.
        """
        from moe_ops.monitor.trainer import callback

        return callback(self, report)

    def whole(self, *, pairs: bool = False) -> dict[str, Layer]:
        """Every layer's sums: with a group those of all ranks, by one collective, and with the pairs only if asked."""
        if self.group is None:
            return self.layers
        ranks = self._gather({name: layer.on_host(pairs) for name, layer in self.layers.items()})
        names = dict.fromkeys(name for layers in ranks for name in layers)
        return {name: total([layers[name] for layers in ranks if name in layers]) for name in names}

    def history(self, name: str) -> Tensor:
        """[steps, E] int64, slots per expert of each step closed (of what was counted so far, where none was).

        With a group the last steps of the ranks are the same one.

        Raises:
            ValueError: no such layer was seen.
        """
        whole = self._layer("history", name, self.whole())
        seen = [self.layers[name].closed()] if name in self.layers else []
        ranks = [closed for closeds in self._gather([closed.cpu() for closed in seen]) for closed in closeds]
        counts = torch.zeros(max(map(len, ranks)), whole.num_experts, dtype=torch.int64)
        for closed in ranks:
            counts[len(counts) - len(closed) :] += closed
        return counts if len(counts) else whole.by_class.sum(0, keepdim=True).cpu()

    def _gather(self, value: Any) -> list[Any]:
        """The value of every rank; without a group of this process alone."""
        if self.group is None:
            return [value]
        values = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def _layer(self, op: str, name: str, layers: dict[str, Layer]) -> Layer:
        if name not in layers:
            known = ", ".join(layers) or "the layers seen, of which there is none yet"
            raise ValueError(f"RouterHealth.{op}: name must be one of {known}, got {name!r}")
        return layers[name]

    def _class_ids(self, experts: Tensor) -> Tensor | None:
        if not self.classes:
            return None
        if self._ids is None or len(self._ids) != len(experts):
            got = "none" if self._ids is None else str(len(self._ids))
            raise ValueError(f"RouterHealth.token_classes: ids must be one per token ({len(experts)}), got {got}")
        return self._ids.to(experts.device)

    def _attach(self, model: torch.nn.Module) -> None:
        ours, theirs, replaced = routers.routers(model), routers.foreign_experts(model), routers.replaced(model)
        if not ours and not theirs and not replaced:
            raise ValueError("RouterHealth: model must have a moe_ops.nn router or experts of transformers, got none")
        layer_of = {id(m.router): m for m in model.modules() if isinstance(m, nn.MoE)}

        def watch(name: str, router: torch.nn.Module) -> None:
            asked = [False]

            def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
                if self._paused or module is not router:  # a copy of the model has copies of the hooks
                    return None
                asked[0] = bool(kwargs.get("stats", False))
                return args, {**kwargs, "stats": True}

            def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
                if self._paused or module is not router:
                    return None
                moe = layer_of.get(id(module))
                capacity = moe.capacity(output.experts.shape[0]) if moe is not None else None
                computing = moe.experts.num_experts if moe is not None else None
                self.update(name, output, capacity=capacity, computing=computing)
                return None if asked[0] else (output.weights, output.experts)

            self._hooks.append(router.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(router.register_forward_hook(after, with_kwargs=True))

        def overhear(name: str, experts: torch.nn.Module) -> None:
            def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                if not self._paused and module is experts:
                    ids = kwargs.get("top_k_index", args[1] if len(args) > 1 else None)
                    self.update(name, (ids, ids), module.num_experts)  # type: ignore[arg-type]

            self._hooks.append(experts.register_forward_pre_hook(before, with_kwargs=True))

        def listen(name: str, experts: torch.nn.Module) -> None:
            def told(module: Any, ids: Tensor, num_experts: int) -> None:
                if not self._paused and module is experts:
                    self.update(name, (ids, ids), num_experts)

            listeners = getattr(experts, routers.LISTENERS)
            listeners.append(told)
            self._listening.append((listeners, told))

        for name, router in ours.items():
            watch(name.removesuffix(".router"), router)
        for name, experts in theirs.items():
            overhear(name.removesuffix(".experts"), experts)
        for name, experts in replaced.items():
            listen(name.removesuffix(".experts"), experts)
