"""A second low-rank term of a layer, which is broadcast and not trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.base import TensorSpec


def residual_specs(specs: Mapping[str, TensorSpec], rank: int) -> dict[str, TensorSpec]:
    """Return the residual tensors after so many stacked ranks."""
    raise NotImplementedError


def compress(
    a: NDArray[np.float64], b: NDArray[np.float64], rank: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return factors of the same product at its rank."""
    raise NotImplementedError
