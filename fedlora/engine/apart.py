"""Which rows may go through a base model together: found by trying, at every load, on rows that are nobody's.

Packing and DP-SGD both need that a row comes out of a batch as it does alone. Where it does not, a client's result
depends on its neighbours, and clipping a row's gradient does not bound what the row changes. Models break it in ways
that no name gives away: a Fourier transform over positions mixes padding in, a window's size depends on the longest
row, a projection is called on relative positions that all rows share, an expert takes as many tokens as fit.

All trained tensors are drawn at random here, those of each group for itself: at a run's start B is zero, and whatever
the adapters do is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.engine.core import Batching, Engine, evaluate
from fedlora.engine.layers import NoRowsError
from fedlora.engine.rounding import told, weakened
from fedlora.engine.work import Arrays
from fedlora.seeded import Seeded
from fedlora.tasks import Batch, Rows

_MODES = (
    Batching(),
    Batching(equal_length=True),
    Batching(one_group=True),
    Batching(equal_length=True, one_group=True),
)
_GROUPS = 2
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3}
_COARSE = 5e-2  # of 16 bits and fewer


def random_tensors(tensors: Arrays, *key: str | int) -> dict[str, NDArray[np.floating]]:
    """Return tensors of the same shapes, drawn uniform on +-1/sqrt(last dimension), the same on every machine."""
    return {
        name: Seeded(0).uniform("probe", name, *key, shape=value.shape, bound=max(1, value.shape[-1]) ** -0.5)
        for name, value in tensors.items()
    }


def find_batching(engine: Engine, tensors: Arrays) -> Batching:
    """Return the least restriction under which each row's loss is the same in every batch as alone.

    Args:
        engine: The engine; its own ``batching`` is not used.
        tensors: All of the method's tensors, for their shapes.

    Raises:
        ValueError: There is none: rows are coupled also where they are of equal length and of one group.
    """
    rows = engine.task.made_up_rows(long=True)
    tolerance = _TOLERANCES.get(next(engine.base.model.parameters()).dtype, _COARSE)
    own, alone = _own(engine, rows, tensors, tolerance)
    found: list[str] = []
    for mode in _MODES:
        trial = replace(engine, batching=mode, max_cost=max(engine.max_cost, 3 * int(rows.cost.max())))
        try:
            fault = _fault(trial, rows, own, alone, tolerance)
        except NoRowsError as error:
            fault = str(error)
        if not fault:
            return mode
        found.append(fault)
    raise ValueError(
        f"model.name: a row's loss depends on the other rows of its batch ({found[-1]}), also where all are of equal "
        "length and of one client. Clients could not be trained together, and under DP clipping a row's gradient would "
        "not bound what the row changes. Use a model and a task whose loss is one mean a row, without normalisation or "
        "capacity over the batch."
    )


def _own(
    engine: Engine, rows: Rows, tensors: Arrays, tolerance: float
) -> tuple[list[dict[str, NDArray[np.floating]]], NDArray[np.float64]]:
    """Return each group's random tensors, and the loss of each row alone with them, [G, rows].

    In 16 bits they are as strong as lets a fault be told from a rounding (:func:`fedlora.engine.rounding.told`).
    """
    drawn = [random_tensors(tensors, "group", g) for g in range(_GROUPS)]

    def alone(strength: float) -> NDArray[np.float64]:
        return _alone(engine, rows, [weakened(engine, one, strength) for one in drawn])

    if tolerance != _COARSE:
        return drawn, alone(1.0)
    strength, found, _ = told(engine, alone, _relative, tolerance)
    return [weakened(engine, one, strength) for one in drawn], found


def _relative(losses: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far losses are apart, by the expected ones where these are larger than 1."""
    return np.abs(losses - expected) / np.maximum(1.0, np.abs(expected))


def _alone(engine: Engine, rows: Rows, own: Sequence[Arrays]) -> NDArray[np.float64]:
    """Return the loss of each row alone, [G, rows]."""
    return np.array([[_losses(engine, rows, [row], one)[0] for row in range(len(rows))] for one in own])


def _fault(engine: Engine, rows: Rows, own: Sequence[Arrays], alone: NDArray[np.float64], tolerance: float) -> str:
    """Return how a row's loss in some batch differs from the one alone; empty where none does."""
    count, equal = alone.shape[1], _of_equal_length(rows.cost)
    if engine.batching != Batching() and not len(equal):
        return "no two rows of equal length to try it with"
    everyone = np.arange(count)
    longest, shortest = int(np.argmax(rows.cost)), int(np.argmin(rows.cost))
    batches = [
        *([(equal, np.zeros(2, dtype=np.int64))] if len(equal) else []),
        (everyone, everyone % _GROUPS),
        (everyone[::-1], (everyone + 1) % _GROUPS),
        (np.array([shortest, longest]), np.array([0, 0])),
        (np.array([shortest, shortest, longest]), np.array([1, 0, 1])),
    ]
    for numbers, group in batches:
        together = _losses(engine, rows, numbers.tolist(), *own, group=group)
        expected = alone[group, numbers]
        off = np.abs(together - expected)
        worst = int(off.argmax())
        if not off[worst] <= tolerance * max(1.0, abs(expected[worst])):
            return f"{together[worst]:.6g} together and {expected[worst]:.6g} alone"
    return ""


def _of_equal_length(cost: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the last two rows of one length, the longest such; empty where all lengths differ."""
    values, counts = np.unique(cost, return_counts=True)
    repeated = values[counts > 1]
    return np.flatnonzero(cost == repeated[-1])[-2:] if len(repeated) else np.zeros(0, dtype=np.int64)


def _losses(
    engine: Engine, rows: Rows, numbers: list[int], *own: Arrays, group: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return the loss of each of these rows, as training takes it."""

    def facts_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": engine.task.row_losses(model, batch)}

    return evaluate(engine, {}, rows, numbers, own=own, group=group, facts_of=facts_of)["loss"]
