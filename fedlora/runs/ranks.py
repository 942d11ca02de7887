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
    zero adds nothing. Of a weight-decomposed layer they are those before its rows are brought to their magnitudes.
    """
    from fedlora.methods import as_low_rank

    added = {name: as_low_rank(factor) for name, factor in factors.items()}
    return {
        name: (one.scaled_b().norm(dim=-2) * one.A.norm(dim=-1)).tolist()
        for name, one in added.items()
        if one is not None
    }


def read_strengths(run: Path) -> dict[str, NDArray[np.float64]]:
    """Return the strengths of each layer of a finished run, [adapters, r]: of the server's, or of each client's.

    An adapter of a smaller rank than others has NaN for those that it does not have. Empty where the run has exported
    nothing yet.
    """
    files = sorted([*run.glob(f"adapter/{FILE}"), *run.glob(f"adapters/*/{FILE}")])
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: _ragged([one[name] for one in read]) for name in read[0]} if read else {}


def _ragged(rows: list[list[float]]) -> NDArray[np.float64]:
    whole = np.full((len(rows), max(map(len, rows))), np.nan)
    for place, row in enumerate(rows):
        whole[place, : len(row)] = row
    return whole


def effective_ranks(layers: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return how many components of each layer are not zero, a mean over the adapters, [layers]."""
    return np.array([(values > 0).sum(axis=1).mean() for values in layers.values()])


def zero_share(layers: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the share of all components that are exactly zero."""
    whole = np.concatenate([values.ravel() for values in layers.values()])
    return float(np.mean(whole[~np.isnan(whole)] == 0))
