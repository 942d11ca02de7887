"""What every reduction checks of tensors that another machine sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedlora.codec import WireError
from fedlora.exchange import Tensors

if TYPE_CHECKING:
    from fedlora.methods import TensorSpec


def check_tensors(tensors: Tensors, expected: Mapping[str, TensorSpec], dtype: str) -> None:
    """Check names, shapes, dtype and that every number is finite.

    Raises:
        WireError: The first thing that is wrong, with the tensor's name.
    """
    for name in expected:
        if name not in tensors:
            raise WireError(f"{name} is missing")
    for name, value in tensors.items():
        if name not in expected:
            raise WireError(f"{name} is not expected")
        if value.shape != expected[name].shape:
            raise WireError(f"{name} has shape {list(value.shape)}, not {list(expected[name].shape)}")
        if str(value.dtype) != dtype:
            raise WireError(f"{name} has dtype {value.dtype}, not {dtype}")
        if not np.isfinite(value).all():
            raise WireError(f"{name} holds NaN or infinity")
