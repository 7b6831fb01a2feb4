"""MoE: a Mixture-of-Experts layer in place of a transformer's feed-forward block."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, overload

import torch
from torch import Tensor

from moe_ops import checks, module_checks
from moe_ops.expert_parallel.sharding import ep_mesh
from moe_ops.nn.expert_parallel import OPTIONS as EXCHANGE
from moe_ops.nn.expert_parallel import ExpertParallelExperts
from moe_ops.nn.experts import Experts
from moe_ops.nn.router import Router
from moe_ops.nn.router_base import RouterBase
from moe_ops.nn.zero_computation import ZeroComputationExperts
from moe_ops.types import RouteResult


class MoE(torch.nn.Module):
    """y = sum over the top_k experts of x of weight · expert(x), and a shared expert's output if there is one.

    Args:
        hidden, inner, num_experts, top_k: sizes; inner is that of one expert.
        router: the options of a `Router` as a mapping, or a router made before: any RouterBase of the same sizes.
        shared_inner: inner size of a shared expert that every token sees; 0 for none.
        shared_gate: weighs the shared expert's output by sigmoid(linear(x)) per token (Qwen2-MoE).
        latent: the routed experts work on a projection of x to this size, and their sum is projected back; router and
            shared expert see x itself.
        zero_computation: experts without a feed-forward layer, which the router chooses by the ids from num_experts on;
            top_k is then of num_experts + zero_computation.num_experts.
        capacity_factor: every expert takes at most ceil(capacity_factor · tokens · top_k / num_experts) rows, the rest
            of its slots are dropped (Fedus et al. 2022); None for no limit.
        drop_policy: which slots are dropped, as in `moe_ops.plan`.
        mesh: a DeviceMesh with a dimension named "ep", over whose ranks the routed experts are spread; see
            `ExpertParallelMoE`. Its options mode, chunks, gradients and name are then keywords too. None: one rank.
        options: every further keyword is an option of `Experts` (activation, gated, bias, impl, ...), for the routed
            and the shared expert alike; weight_on is that of the routed ones.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        num_experts: int,
        top_k: int,
        *,
        router: RouterBase | Mapping[str, Any] | None = None,
        shared_inner: int = 0,
        shared_gate: bool = False,
        latent: int | None = None,
        zero_computation: ZeroComputationExperts | None = None,
        capacity_factor: float | None = None,
        drop_policy: str = "position",
        weight_on: str = "output",
        mesh: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        module_checks.sizes("MoE", hidden=hidden, inner=inner, num_experts=num_experts)
        checks.integer("MoE", "shared_inner", shared_inner, 0, checks.MAX_INT32)
        checks.flag("MoE", "shared_gate", shared_gate)
        if shared_gate and not shared_inner:
            raise ValueError("MoE: shared_gate needs a shared expert, got shared_inner=0")
        if latent is not None:
            module_checks.sizes("MoE", latent=latent)
        checks.option("MoE", "drop_policy", drop_policy, checks.DROP_POLICIES)
        if mesh is not None:
            ep_mesh("MoE", mesh)
        module_checks.parameters("MoE", dtype)
        expected = "a Router, a mapping of its options or None"
        module_checks.instance("MoE", "router", router, (RouterBase, Mapping, type(None)), expected)
        routed = num_experts + _more_experts(zero_computation, hidden)
        if not isinstance(router, RouterBase):
            router = Router(hidden, routed, top_k, device=device, dtype=dtype, **(router or {}))
        sizes = (router.hidden, router.num_experts, router.top_k)
        if sizes != (hidden, routed, top_k):
            raise ValueError(f"MoE: router must have hidden, num_experts, top_k {(hidden, routed, top_k)}, got {sizes}")
        if zero_computation is not None and not router.token_choice:
            raise ValueError("MoE: zero_computation must be None where experts choose, got ZeroComputationExperts")

        def linear(wide: int, out: int) -> torch.nn.Linear:
            return torch.nn.Linear(wide, out, bias=False, device=device, dtype=dtype)

        self.hidden, self.drop_policy = hidden, drop_policy
        exchange = {name: options.pop(name) for name in EXCHANGE if name in options}
        options = {**options, "device": device, "dtype": dtype}
        self.router = router
        self.capacity_factor = capacity_factor
        if mesh is None:
            if exchange:
                raise ValueError(f"MoE: {next(iter(exchange))} must not be given without mesh, got mesh=None")
            self.experts = Experts(num_experts, latent or hidden, inner, weight_on=weight_on, **options)
        else:
            exchange |= {"mesh": mesh, "weight_on": weight_on}
            self.experts = ExpertParallelExperts(num_experts, latent or hidden, inner, **exchange, **options)
        self.zero_computation = zero_computation
        self.latent_in = linear(hidden, latent) if latent else None
        self.latent_out = linear(latent, hidden) if latent else None
        # One expert that every token chooses: the same formula, and the same memory law, as the routed ones.
        self.shared = Experts(1, hidden, shared_inner, **options) if shared_inner else None
        self.shared_gate = linear(hidden, 1) if shared_gate else None
        if isinstance(self.experts, ExpertParallelExperts):
            self.experts.agree(
                hidden=hidden, latent=latent, router=type(router).__name__, routed=routed, top_k=top_k,
                shared_inner=shared_inner, shared_gate=shared_gate,
            )  # fmt: skip

    @property
    def capacity_factor(self) -> float | None:
        """Of the rows an expert takes; may be set between steps."""
        return self._capacity_factor

    @capacity_factor.setter
    def capacity_factor(self, factor: float | None) -> None:
        # The factor as it was written, in integers: 1.1 · 50 is 55 rows, and a symbolic number of tokens stays one.
        self._capacity_ratio: tuple[int, int] | None = None
        if factor is not None:
            checks.number("MoE", "capacity_factor", factor, positive=True)
            if not self.router.token_choice:
                raise ValueError(f"MoE: capacity_factor must be None where experts choose, got {factor}")
            self._capacity_ratio = Fraction(str(factor)).as_integer_ratio()
        self._capacity_factor = factor

    def capacity(self, tokens: int) -> int | None:
        """Rows an expert takes from a batch of this many tokens; None where there is no limit."""
        if self._capacity_ratio is None:
            return None
        rows, per_tokens = self._capacity_ratio
        rows, per_tokens = rows * self.router.top_k, per_tokens * self.router.num_experts
        return (tokens * rows + per_tokens - 1) // per_tokens

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        return_route: Literal[False] = False,
        segments: Tensor | None = None,
        num_segments: int = 1,
        token_ids: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        return_route: Literal[True],
        segments: Tensor | None = None,
        num_segments: int = 1,
        token_ids: Tensor | None = None,
    ) -> tuple[Tensor, RouteResult]: ...

    def forward(
        self,
        x: Tensor,
        *,
        return_route: bool = False,
        segments: Tensor | None = None,
        num_segments: int = 1,
        token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RouteResult]:
        """Applies the layer to x [..., hidden].

        Args:
            return_route: also returns the RouteResult, from which the losses and `Router.update_bias` work.
            segments, num_segments: which sequence each of the flattened tokens belongs to, for RouteResult's counts and
                mean_prob, as in `moe_ops.route`.
            token_ids: [...], the tokens' vocabulary ids, where the router is a `HashRouter`.

        Returns:
            y, of x's shape and dtype, or (y, RouteResult).
        """
        module_checks.tokens("MoE", x, self.hidden)
        checks.flag("MoE", "return_route", return_route)
        token_ids = module_checks.token_ids("MoE", token_ids, x)
        tokens = x.reshape(-1, self.hidden)
        route = None
        if return_route:
            statistics = {"segments": segments, "num_segments": num_segments}
            route = self.router(tokens, stats=True, token_ids=token_ids, **statistics)
            weights, experts = route.weights, route.experts
        else:
            weights, experts = self.router(tokens, token_ids=token_ids)
        inputs = tokens if self.latent_in is None else _linear(self.latent_in, tokens)
        options: dict[str, Any] = {"capacity": self.capacity(tokens.shape[0]), "drop_policy": self.drop_policy}
        shared = None if self.shared is None else lambda: self._shared(tokens)
        if isinstance(self.experts, ExpertParallelExperts):
            if self.latent_out is None:  # the shared expert works while rows travel
                options["shared"], shared = shared, None
        else:
            options["plan"] = self.router.plan(experts)
        # plan (but for a router's own), permute, grouped_gemm, grouped_gemm and combine, in one.
        y = self.experts(inputs, weights, experts, **options)
        if self.latent_out is not None:
            y = _linear(self.latent_out, y)
        if self.zero_computation is not None:  # their ids are out of range, and so dropped, for self.experts
            y = y + self.zero_computation(tokens, weights, experts, self.experts.num_experts).to(y.dtype)
        if shared is not None:
            y = y + shared()
        y = y.reshape(x.shape)
        return y if route is None else (y, route)

    def prepack(self, *, dtype: torch.dtype | None = None) -> MoE:
        """Packs the weights of all experts for inference on the CPU, in place: see `Experts.prepack`. Returns self."""
        for experts in (self.experts, self.shared):
            if experts is not None:
                experts.prepack(dtype=dtype)
        return self

    def _shared(self, tokens: Tensor) -> Tensor:
        """What the shared expert, which every token chooses, makes of tokens [tokens, hidden]."""
        assert self.shared is not None
        experts = torch.zeros(tokens.shape[0], 1, dtype=torch.int32, device=tokens.device)
        if self.shared_gate is None:
            weights = torch.ones_like(experts, dtype=torch.float32)
        else:
            weights = torch.sigmoid(_linear(self.shared_gate, tokens))
        y: Tensor = self.shared(tokens, weights, experts)
        return y


class ExpertParallelMoE(MoE):
    """An `MoE` whose routed experts are spread over the ranks of a mesh: `MoE(..., mesh=mesh)` by its name.

        mesh = init_device_mesh("cuda", (dp, ep), mesh_dim_names=("dp", "ep"))
        layer = ExpertParallelMoE(hidden, inner, num_experts, top_k, mesh=mesh)

    Rank r of W of the dimension "ep" has the experts r · ceil(E/W) to (r + 1) · ceil(E/W), as DTensors: see
    `ExpertParallelExperts`. Router, shared expert and projections are ordinary parameters, which every rank has whole:
    average their gradients with DistributedDataParallel, after `moe_ops.expert_parallel.ignore_in_ddp`, or FSDP2.

    Every rank routes its own tokens, and all ranks of the dimension must call, with as many tokens as each has. What
    `return_route` gives is of the rank's own tokens, nothing is reduced: `losses.load_balancing(route, group=group)`
    and `LossFreeBalancing(model, group=group)` sum the counts over ranks. capacity_factor is of the rank's own tokens
    too: every expert takes so many rows from each rank.

    Args:
        mesh: a DeviceMesh with a dimension named "ep".
        mode, chunks, gradients, name: see `ExpertParallelExperts`.
        Others: as in `MoE`; impl must be "moe_ops".

    Building is collective, as in `ExpertParallelExperts`. A rank that dies, hangs or disagrees later is an exception on
    every other one within the timeout of the process group; it names the operation and the layer.
    """

    def __init__(self, hidden: int, inner: int, num_experts: int, top_k: int, *, mesh: Any, **options: Any) -> None:
        ep_mesh("ExpertParallelMoE", mesh)
        super().__init__(hidden, inner, num_experts, top_k, mesh=mesh, **options)


def _linear(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """layer(x); float32 weights under bfloat16 or float16 tokens are rounded, as those of the experts are."""
    weight: Any = layer.weight
    mixed = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
    if mixed and (x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type)):
        return torch.nn.functional.linear(x, weight.to(x.dtype))
    y: Tensor = layer(x)
    return y


def _more_experts(zero_computation: Any, hidden: int) -> int:
    """How many experts the router scores beside those that compute."""
    expected = "a ZeroComputationExperts or None"
    module_checks.instance("MoE", "zero_computation", zero_computation, (ZeroComputationExperts, type(None)), expected)
    if zero_computation is None:
        return 0
    if zero_computation.hidden != hidden:
        raise ValueError(f"MoE: zero_computation must have hidden {hidden}, got {zero_computation.hidden}")
    return int(zero_computation.num_experts)
