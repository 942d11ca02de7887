"""What methods refuse of a configuration, and the fixed factors that several of them start with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.config import Config, MethodConfig, require
from fedlora.methods.base import Layer, Method, TensorSpec


def refuse_rslora(config: Config) -> None:
    """Refuse ``method.rslora`` for a method that scales by alpha / rank."""
    if config.method.rslora:
        raise ValueError(f"method.rslora = true: is read by lora; {config.method.name} scales by alpha / rank.")


def refuse_scale(config: Config) -> None:
    """Refuse ``method.alpha`` and ``method.rslora`` for a method without a scale."""
    rule = f"{config.method.name} has no scale alpha / r: leave it at its default."
    for key in ("alpha", "rslora"):
        value = getattr(config.method, key)
        require(value == getattr(MethodConfig, key), f"method.{key}", value, rule)


def check_products(config: Config, method: Method) -> None:
    """Refuse a ``train.gradient`` that has to know each layer's A and B, where a method has none."""
    gradient, name, init = config.train.gradient, config.method.name, config.method.init
    start = "" if init == "auto" else f" and method.init = {init!r}"
    rule = f"is of a product B A of two tensors, and a layer's update is none with {name!r}{start}; use 'plain', or a "
    rule += "method such as 'lora', with method.init = 'auto'."
    require(gradient == "plain" or bool(method.scaled_pairs()), "train.gradient", gradient, rule)


def check_init(config: Config, known: Sequence[str]) -> None:
    """Refuse a ``method.init`` that the method does not know."""
    init, rule = config.method.init, f"method {config.method.name!r} knows {', '.join(('auto', *known))}."
    require(init in ("auto", *known), "method.init", init, rule)


def orthonormal(config: Config, layers: Sequence[Layer], rank: int) -> bool:
    """Return whether factors are to be drawn orthonormal, by ``method.init``.

    Args:
        config: The configuration.
        layers: The adapted layers.
        rank: Rows of A and columns of B.

    Raises:
        ConfigError: A layer has fewer features than that.
    """
    init = config.method.init
    if init == "auto":
        return False
    for layer in layers:
        features = min(layer.d_in, layer.d_out)
        rule = f"{rank} orthonormal vectors do not fit into the {features} features of {layer.name}; lower method.rank."
        require(rank <= features, "method.init", init, rule)
    return init == "orthonormal"


def fixed(kind: str, shape: tuple[int, int], product: tuple[str, ...], orthonormal: bool) -> TensorSpec:
    """Return a fixed A [r, d_in] or B [d_out, r], whose rows or columns have length one, on average or exactly.

    Args:
        kind: ``A`` or ``B``.
        shape: Its shape.
        product: The products that it is a factor of.
        orthonormal: What :func:`orthonormal` says.
    """
    features = shape[1] if kind == "A" else shape[0]
    return TensorSpec(shape, kind, product, math.sqrt(3 / features), orthonormal=orthonormal)
