"""MoEConfig: one MoE layer, fully said, and how many of them stand in which model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from moe_ops import checks, module_checks, nn
from moe_ops.config.describe import Description, describe

SIZES = {
    "hidden",
    "inner",
    "num_experts",
    "top_k",
    "device",
    "dtype",
}  # said by the config and by build
ROUTERS = {"top_k": nn.Router, "switch": nn.SwitchRouter, "sparse_mixer": nn.SparseMixerRouter}


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The MoE layer of a model, and enough of the model to count it.

    Args:
        hidden, inner, num_experts, top_k: sizes; inner is that of one expert.
        router: options of the router.
        router_kind: "top_k" for `moe_ops.nn.Router`, "switch" for `SwitchRouter` (top_k is 1), "sparse_mixer" for
            `SparseMixerRouter`.
        experts: options of `moe_ops.nn.Experts` (activation, gated, bias, ...), for routed and shared experts alike.
        shared_inner, shared_gate, latent, capacity_factor, drop_policy: as in `moe_ops.nn.MoE`.
        moe_layers: how many such layers the model has.
        embedding: parameters of the table that turns token ids into vectors: looked up, not multiplied.
        tied: whether that table is also the output projection, and then is multiplied.
        backbone: parameters of everything else outside the MoE layers: attention, dense layers, norms, the output
            projection where it is not tied. 0 where only the layer is said.
        name: of the model.
        source: where the numbers come from.
        unsaid: what the model's layer does that `moe_ops.nn.MoE` does not; empty where build gives the whole layer.
    """

    hidden: int
    inner: int
    num_experts: int
    top_k: int
    router: Mapping[str, Any] = field(default_factory=dict, hash=False)
    router_kind: str = "top_k"
    experts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shared_inner: int = 0
    shared_gate: bool = False
    latent: int | None = None
    capacity_factor: float | None = None
    drop_policy: str = "position"
    moe_layers: int = 1
    embedding: int = 0
    tied: bool = False
    backbone: int = 0
    name: str = ""
    source: str = ""
    unsaid: str = ""

    def __post_init__(self) -> None:
        op = "MoEConfig"
        module_checks.sizes(op, hidden=self.hidden, inner=self.inner, num_experts=self.num_experts, top_k=self.top_k)
        if self.top_k > self.num_experts:
            raise ValueError(f"{op}: top_k must be between 1 and num_experts ({self.num_experts}), got {self.top_k}")
        module_checks.instance(op, "router_kind", self.router_kind, (str,), "a str")
        if self.router_kind not in ROUTERS:
            raise ValueError(f"{op}: router_kind must be one of {', '.join(ROUTERS)}, got {self.router_kind!r}")
        if self.router_kind == "switch" and self.top_k != 1:
            raise ValueError(f"{op}: top_k must be 1 with router_kind 'switch', got {self.top_k}")
        for name in ("router", "experts"):
            module_checks.instance(op, name, getattr(self, name), (Mapping,), "a mapping of options")
            object.__setattr__(self, name, dict(getattr(self, name)))  # the caller's dict stays the caller's
        for name, kind in (("router", ROUTERS[self.router_kind]), ("experts", nn.Experts)):
            known = inspect.signature(kind).parameters.keys() - SIZES
            if unknown := sorted(getattr(self, name).keys() - known):
                raise TypeError(f"{op}: {name} must have options among {', '.join(sorted(known))}, got {unknown[0]!r}")
        for name in ("shared_inner", "moe_layers", "embedding", "backbone"):
            checks.integer(op, name, getattr(self, name), 0, 2**63 - 1)
        module_checks.flags(op, shared_gate=self.shared_gate, tied=self.tied)
        if self.latent is not None:
            module_checks.sizes(op, latent=self.latent)
        if self.capacity_factor is not None:
            checks.number(op, "capacity_factor", self.capacity_factor, positive=True)
        checks.option(op, "drop_policy", self.drop_policy, checks.DROP_POLICIES)
        for name in ("name", "source", "unsaid"):
            module_checks.instance(op, name, getattr(self, name), (str,), "a str")

    @classmethod
    def preset(cls, name: str) -> MoEConfig:
        """The configuration of a published model, or of a standing shape of the benches.

        Args:
            name: one of `MoEConfig.presets()`; case, spaces and underscores do not matter.

        Raises:
            ValueError: the name is unknown, or that of a model that is dense or unpublished: the text says which.
        """
        from moe_ops.config import presets

        return presets.get(name)

    @staticmethod
    def presets() -> tuple[str, ...]:
        """The names that `preset` knows."""
        from moe_ops.config import presets

        return tuple(presets.PRESETS)

    @classmethod
    def from_hf(cls, config: Any, *, count: bool = True) -> MoEConfig:
        """The configuration that a transformers config (`AutoConfig.from_pretrained(...)`) says.

        Args:
            config: a PretrainedConfig of an MoE family; one with several parts is read at its text part.
            count: counts the model around the MoE layers too, by building it without memory (on the meta device);
                where False, embedding and backbone are 0.

        Raises:
            TypeError, ValueError: config is no transformers config, has no experts or lacks a field, or is of a family
                not known here.
            ImportError: transformers is needed to count, and is not installed.
        """
        from moe_ops.config import hf

        return hf.read(config, count)

    def replace(self, **changes: Any) -> MoEConfig:
        """A copy with some fields changed; unknown names raise a TypeError that lists the fields."""
        known = [each.name for each in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"MoEConfig: changes must be among {', '.join(known)}, got {name!r}")
        return replace(self, **changes)

    def build(
        self,
        *,
        approximate: bool = False,
        impl: str = "moe_ops",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> nn.MoE:
        """One layer, drawn anew: `moe_ops.nn.MoE` of this configuration.

        Args:
            approximate: builds also where `unsaid` names something that MoE cannot say, without it.
            impl, device, dtype: as in `moe_ops.nn.MoE`.
            changes: fields that shall differ, as in `replace`: `preset("mixtral-8x7b").build(hidden=64, inner=96)`.

        Raises:
            ValueError: `unsaid` is not empty and approximate is False.
        """
        config = self.replace(**changes) if changes else self
        if config.unsaid and not approximate:
            raise ValueError(f"MoEConfig: {config.unsaid}; approximate=True builds the layer without it")
        sizes = (config.hidden, config.num_experts, *([] if config.router_kind == "switch" else [config.top_k]))
        router = ROUTERS[config.router_kind](*sizes, device=device, dtype=dtype, **config.router)
        return nn.MoE(
            config.hidden,
            config.inner,
            config.num_experts,
            config.top_k,
            router=router,
            shared_inner=config.shared_inner,
            shared_gate=config.shared_gate,
            latent=config.latent,
            capacity_factor=config.capacity_factor,
            drop_policy=config.drop_policy,
            impl=impl,
            device=device,
            dtype=dtype,
            **config.experts,
        )

    def describe(self, tokens: int = 4096) -> Description:
        """Parameters, bytes, FLOPs per token and what is kept for backward, as numbers and as a table (`str`).

        Args:
            tokens: how many tokens a training step sends through a layer at once.
        """
        checks.integer("MoEConfig.describe", "tokens", tokens, 0, checks.MAX_INT32)
        return describe(self, tokens)
