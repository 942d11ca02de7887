"""Experts: tensors in several versions at the server, of which a client trains one and holds the others as they are.

The versions of a tensor ``<name>`` are sent together as ``<name>_all``, with an axis for the experts in front. Which of
them is a client's own stands in its instruction (:attr:`fedlora.exchange.Instruction.experts`); the client trains a
copy of it under ``<name>`` and sends that back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

ALL = "_all"
"""Ends the name, and the kind, of what holds all versions of a tensor."""
OWN = "experts.own"
"""The tensor [experts] that is 1 where the expert is the client's own, and else 0."""


def copied(tensors: Mapping[str, NDArray[np.floating]], expert: int) -> dict[str, NDArray[np.floating]]:
    """Return what a client has for itself of the experts among ``tensors``: copies of its own one, and :data:`OWN`.

    Raises:
        ValueError: There are not so many experts.
    """
    versions = {name.removesuffix(ALL): value for name, value in tensors.items() if name.endswith(ALL)}
    counts = {len(value) for value in versions.values()}
    if len(counts) != 1 or not 0 <= expert < min(counts):
        raise ValueError(f"expert {expert} is not one of those that were sent, {sorted(counts)}")
    (count,), dtype = counts, next(iter(versions.values())).dtype
    return {**{name: value[expert] for name, value in versions.items()}, OWN: np.eye(count, dtype=dtype)[expert]}
