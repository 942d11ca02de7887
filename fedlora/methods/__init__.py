"""Low-rank methods: one file each, one registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedlora.config import MethodConfig
from fedlora.methods.base import (
    Dense,
    Factor,
    Layer,
    LowRank,
    Method,
    TensorSpec,
    count_parameters,
    initial_tensors,
    tensors_digest,
)
from fedlora.methods.head import Head
from fedlora.methods.lora import Lora
from fedlora.registry import Registry

METHODS: Registry[Callable[[Sequence[Layer], MethodConfig], Method]] = Registry("method.name")


@METHODS.register("lora")
def _lora(layers: Sequence[Layer], config: MethodConfig) -> Method:
    return Lora(layers, rank=config.rank, alpha=config.alpha, rslora=config.rslora)


def build_method(config: MethodConfig, adapted: Sequence[Layer], head: Sequence[Layer]) -> Method:
    """Return the method ``config.name`` on the layers ``adapted``, joined to a head on the layers ``head``."""
    return Head(METHODS[config.name](adapted, config), head)


__all__ = [
    "METHODS",
    "Dense",
    "Factor",
    "Head",
    "Layer",
    "Lora",
    "LowRank",
    "Method",
    "TensorSpec",
    "build_method",
    "count_parameters",
    "initial_tensors",
    "tensors_digest",
]
