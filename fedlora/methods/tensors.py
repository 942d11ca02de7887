"""A method's tensors: how many numbers and bytes they are, what they start at, and their proximal step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.base import TensorSpec
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor


def count_parameters(specs: Mapping[str, TensorSpec]) -> int:
    """Return the number of elements of these tensors."""
    return sum(math.prod(spec.shape) for spec in specs.values())


def payload_bytes(specs: Mapping[str, TensorSpec], dtype: str) -> int:
    """Return the bytes of these tensors in a message, without its manifest."""
    return count_parameters(specs) * np.dtype(dtype).itemsize


def initial_tensors(
    specs: Mapping[str, TensorSpec], seeded: Seeded, dtype: str = "float64", round_number: int = 0
) -> dict[str, NDArray[np.floating]]:
    """Return the tensors as every machine with the same seed starts them, without a group axis.

    Each is keyed by its own name, so layers of one shape still start differently.

    Args:
        specs: The tensors.
        seeded: The run's seed.
        dtype: Of the tensors.
        round_number: The round, from 1, for which tensors that start anew in each round are drawn; 0: those of the run.
    """
    key = (round_number,) if round_number else ()

    def start(name: str, spec: TensorSpec) -> NDArray[np.float64]:
        if not spec.bound:
            return np.full(spec.shape, spec.start)
        if spec.orthonormal:
            return seeded.orthonormal("init", name, *key, shape=spec.shape)
        return seeded.uniform("init", name, *key, shape=spec.shape, bound=spec.bound)

    return {name: start(name, spec).astype(dtype) for name, spec in specs.items()}


def zero_kinds(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, bool]]:
    """Return by product, for each kind that is a factor of it, whether it starts at zero."""
    products: dict[str, dict[str, bool]] = {}
    for spec in specs.values():
        for product in spec.factors:
            products.setdefault(product, {})[spec.kind] = spec.bound == spec.start == 0.0
    return products


def check_start(specs: Mapping[str, TensorSpec]) -> None:
    """See to it that each product starts at zero, and can leave it: exactly one of its factors is zero.

    With two zero factors no gradient ever comes; with none the model does not start as its base. A layer that is
    replaced, as a head is, is no product; neither is an update of one tensor, which must not start at zero where it is
    not linear in it, as it would have no gradient there.
    """
    products = zero_kinds(specs)
    for product, kinds in products.items():
        factors = {kind[0]: zero for kind, zero in kinds.items()}
        zero = [factor for factor, is_zero in factors.items() if is_zero]
        assert len(factors) == 1 or len(zero) == 1, f"{product}: of {', '.join(factors)} one must start at zero: {zero}"
    for name, spec in specs.items():
        alone = any(len(products[product]) == 1 for product in spec.factors)
        at_zero = spec.bound == spec.start == 0.0
        assert spec.linear or not alone or not at_zero, f"{name} must not start at zero: it would have no gradient"


T = TypeVar("T", bound="NDArray[np.floating] | Tensor")


def soft_threshold(x: T, threshold: T | float) -> T:
    """Return ``sign(x) max(|x| - threshold, 0)``, the proximal step of an L1 penalty; of an array or a tensor."""
    whole: Any = x
    result: T = whole - whole.clip(-threshold, threshold)
    return result


def proximal_step(
    tensors: Mapping[str, NDArray[np.floating]], specs: Mapping[str, TensorSpec], learning_rate: float
) -> dict[str, NDArray[np.floating]]:
    """Return those of the tensors that have an L1 weight, after a proximal step of its penalty."""
    return {name: soft_threshold(tensors[name], learning_rate * spec.l1) for name, spec in specs.items() if spec.l1}


def tensors_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return a SHA-256 digest of tensors with their names, shapes and dtypes."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name}{value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()
