"""How much of each layer's rank a run uses: strengths of its components, effective ranks, and their pattern."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedlora.methods import Factor

FILE = "ranks.json"  # beside each exported adapter


def strengths(factors: Mapping[str, Factor]) -> dict[str, list[float]]:
    """Return for each adapted layer the Frobenius norm of each rank-one component of its update, [r].

    The component of rank i is ``scale_i B_:i A_i:``, whose norm is ``|scale_i| |B_:i| |A_i:|``; one that is exactly
    zero adds nothing.
    """
    from fedlora.methods import LowRank

    return {
        name: (factor.scaled_b().norm(dim=-2) * factor.A.norm(dim=-1)).tolist()
        for name, factor in factors.items()
        if isinstance(factor, LowRank)
    }


def read_strengths(run: Path) -> dict[str, NDArray[np.float64]]:
    """Return the strengths of each layer of a finished run, [adapters, r]: of the server's, or of each client's.

    Empty where the run has exported nothing yet.
    """
    files = sorted([*run.glob(f"adapter/{FILE}"), *run.glob(f"adapters/*/{FILE}")])
    told = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: np.array([one[name] for one in told]) for name in told[0]} if told else {}


def effective_ranks(told: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return how many components of each layer are not zero, a mean over the adapters, [layers]."""
    return np.array([np.count_nonzero(values, axis=1).mean() for values in told.values()])


def zero_share(told: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the share of all components that are exactly zero."""
    return float(np.mean(np.concatenate([values.ravel() for values in told.values()]) == 0))
