"""Delta W: what low-rank tensors add to each layer's weight, as dense matrices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.methods import LowRank, Method

_RESIDUAL = ".residual_"  # what a server has stacked: names end in it and A or B


def updates(method: Method, tensors: Mapping[str, NDArray[np.floating]]) -> dict[str, NDArray[np.float64]]:
    """Return Delta W of each of a method's layers, [d_out, d_in], in float64; residuals that are there are added."""
    named = {name: torch.tensor(np.asarray(value)).double() for name, value in tensors.items()}
    factors = method.factors({name: value for name, value in named.items() if _RESIDUAL not in name})
    found = {}
    for layer, factor in factors.items():
        if isinstance(factor, LowRank):
            update = factor.scaled_b() @ factor.A
            if f"{layer}{_RESIDUAL}A" in named:
                update = update + factor.scale * named[f"{layer}{_RESIDUAL}B"] @ named[f"{layer}{_RESIDUAL}A"]
            found[layer] = update.numpy()
    return found
