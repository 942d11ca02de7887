"""Low-rank methods: one file each, one registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora.config import Config, MethodConfig
from fedlora.methods.base import (
    Dense,
    Factor,
    Layer,
    LowRank,
    Method,
    TensorSpec,
    check_start,
    count_parameters,
    initial_tensors,
    proximal_step,
    soft_threshold,
    tensors_digest,
    zero_kinds,
)
from fedlora.methods.head import Head
from fedlora.methods.lora import Lora
from fedlora.methods.mos import Mos
from fedlora.methods.s2_lora import S2Lora
from fedlora.registry import Registry
from fedlora.seeded import Seeded

METHODS: Registry[Callable[[Sequence[Layer], Config], Method]] = Registry("method.name")


@METHODS.register("lora")
def _lora(layers: Sequence[Layer], config: Config) -> Method:
    method = config.method
    return Lora(layers, rank=method.rank, alpha=method.alpha, rslora=method.rslora)


@METHODS.register("mos")
def _mos(layers: Sequence[Layer], config: Config) -> Method:
    method = _plain_scale(config)
    return Mos(layers, rank=method.rank, alpha=method.alpha, config=config.mos, seeded=Seeded(config.seed))


@METHODS.register("s2-lora")
def _s2_lora(layers: Sequence[Layer], config: Config) -> Method:
    method, s2 = _plain_scale(config), config.s2
    return S2Lora(layers, rank=method.rank, alpha=method.alpha, sparsity=s2.sparsity, orthogonality=s2.orthogonality)


def _plain_scale(config: Config) -> MethodConfig:
    if config.method.rslora:
        raise ValueError(f"method.rslora = true: is read by lora; {config.method.name} scales by alpha / rank.")
    return config.method


def build_method(config: Config, adapted: Sequence[Layer], head: Sequence[Layer]) -> Method:
    """Return the method ``method.name`` on the layers ``adapted``, joined to a head on the layers ``head``."""
    method = Head(METHODS[config.method.name](adapted, config), head)
    check_start(method.specs())
    return method


__all__ = [
    "METHODS",
    "Dense",
    "Factor",
    "Head",
    "Layer",
    "Lora",
    "LowRank",
    "Method",
    "Mos",
    "S2Lora",
    "TensorSpec",
    "build_method",
    "check_start",
    "count_parameters",
    "initial_tensors",
    "proximal_step",
    "soft_threshold",
    "tensors_digest",
    "zero_kinds",
]
