"""RouterReplay: a routing recorded in one pass chooses the experts of another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.monitor import routers
from moe_ops.nn.router_base import segment_counts
from moe_ops.types import NoisyRouteResult, RouteResult

WEIGHTS = {"recomputed": 0, "recorded": 1}


class RouterReplay:
    """Records which experts every router of a model chose, and makes a later pass choose the same.

        replay = RouterReplay(model)
        with replay.record():
            model(x)                 # a rollout, say, or a pass with jitter
        with replay.play():
            model(x).sum().backward()

    Reinforcement learning needs it, where training must see the experts that generation saw (Ma et al. 2025,
    "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers", arXiv:2510.11370).

    While playing, only the choice is replayed: weights come from the logits of the moment and have gradients. A token
    that would choose as recorded anyway keeps the bits of `moe_ops.route`, forward and backward, so that playing back
    under the same parameters is exact where the router draws no noise (jitter and NoisyTopKRouter's noise are drawn
    anew); another's weights are the router's formula in plain PyTorch (its `weigh`).

    Attributes:
        routing: for every router by name, (weights [T, K], experts [T, K]) of each of its calls, in order, without
            gradients. It may be saved with torch.save, moved and loaded.

    Raises:
        TypeError, ValueError: model is no Module, or has no router.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        module_checks.instance("RouterReplay", "model", model, (torch.nn.Module,), "a Module")
        self._routers = routers.routers(model)
        if not self._routers:
            raise ValueError("RouterReplay: model must have a moe_ops.nn router, got none")
        self.routing: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def record(self) -> Iterator[RouterReplay]:
        """Passes in here are recorded, in place of what was."""
        self.routing = {name: [] for name in self._routers}

        def keep(name: str) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                with torch.inference_mode(False):  # tensors of a rollout in inference mode could not be trained on
                    weights, experts = (t.detach().clone() if t.is_inference() else t.detach() for t in output[:2])
                self.routing[name].append((weights, experts))

            return hook

        hooks = [router.register_forward_hook(keep(name)) for name, router in self._routers.items()]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def play(self, *, weights: str = "recomputed") -> Iterator[RouterReplay]:
        """Passes in here choose the experts that were recorded, call by call.

        Args:
            weights: "recomputed" as above; "recorded": the weights too are those recorded, and the router gets no
                gradient: the only way for SparseMixerRouter, whose weights depend on how it chose.

        Raises:
            RuntimeError: a router is called more often than was recorded, or, at the end, less often; or it is played
                already.
            TypeError: weights is "recomputed", and a router cannot weigh experts that it did not choose itself.
            ValueError: a call has another number of tokens than was recorded.
        """
        recorded = bool(checks.option("RouterReplay.play", "weights", weights, WEIGHTS))
        players: list[Player] = []
        try:
            for name, router in self._routers.items():
                players.append(Player(name, router, self.routing.get(name, []), recorded))
            yield self
            for player in players:
                player.check_end()
        finally:
            for player in players:
                player.remove()


class Player:
    """Replaces the choice of one router."""

    def __init__(self, name: str, router: Any, calls: list[tuple[Tensor, Tensor]], recorded: bool) -> None:
        if not recorded and router.scores_by is None:
            kind = type(router).__name__
            raise TypeError(f"RouterReplay.play: weights must be 'recorded' for {name}, a {kind}, got 'recomputed'")
        if not recorded and router.scores_by in vars(router):
            raise RuntimeError(f"RouterReplay.play: {name} is played already, and cannot be played within that")
        self.name, self.router, self.calls, self.recorded = name, router, calls, recorded
        self.played = 0
        self.scores: Any = None
        if not recorded:
            of_class = getattr(type(router), router.scores_by)

            def scores(x: Tensor) -> Any:
                self.scores = of_class(router, x)
                return self.scores

            setattr(router, router.scores_by, scores)
        # Before the hooks of RouterHealth and LossFreeBalancing, which count what is used.
        self.hook = router.register_forward_hook(self.replace, prepend=True, with_kwargs=True)

    def replace(self, router: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.played == len(self.calls):
            raise RuntimeError(
                f"RouterReplay.play: {self.name} was recorded {len(self.calls)} times, and is called again"
            )
        weights, experts = (t.to(output[0].device) for t in self.calls[self.played])
        if experts.shape != output[1].shape:
            expected = f"[tokens, top_k] {list(experts.shape)} as recorded"
            raise ValueError(f"RouterReplay.play: {self.name} must route {expected}, got {list(output[1].shape)}")
        self.played += 1
        if not self.recorded:
            natural, chosen = output[:2]  # kept to the bit where they are those recorded
            weights = torch.where((experts == chosen).all(1, keepdim=True), natural, router.weigh(self.scores, experts))
        if not isinstance(output, (RouteResult, NoisyRouteResult)):
            return weights, experts
        segments, num_segments = kwargs.get("segments"), kwargs.get("num_segments", 1)
        counts = segment_counts(experts, router.num_experts, segments, num_segments)
        return output._replace(weights=weights, experts=experts, counts=counts)

    def check_end(self) -> None:
        if self.played != len(self.calls):
            raise RuntimeError(
                f"RouterReplay.play: {self.name} was recorded {len(self.calls)} times, but called {self.played} times"
            )

    def remove(self) -> None:
        self.hook.remove()
        if not self.recorded:
            delattr(self.router, self.router.scores_by)
