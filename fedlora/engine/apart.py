"""Which rows may go through a base model together: found by trying, at every load, on rows that are nobody's.

Packing and DP-SGD both need that a row comes out of a batch as it does alone. Where it does not, a client's result
depends on its neighbours, and clipping a row's gradient does not bound what the row changes. Models break it in ways
that no name gives away: a Fourier transform over positions mixes padding in, a window's size depends on the longest
row, a projection is called on relative positions that all rows share, an expert takes as many tokens as fit.

All trained tensors are drawn at random here, those of each group for itself: at a run's start B is zero, and whatever
the adapters do is nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.engine.blocks import blocks_of
from fedlora.engine.core import Batching, Engine, evaluate
from fedlora.engine.layers import NoRowsError
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
ROUNDINGS = 3
"""Numbers of 16 bits may differ by this many times what one rounding of each block's output changes."""
STRENGTHS = (1.0, 1 / 4, 1 / 16)
"""What random tensors are multiplied with in turn, see :func:`weakened`: weaker ones than these do nothing."""


def random_tensors(tensors: Arrays, *key: str | int) -> dict[str, NDArray[np.floating]]:
    """Return tensors of the same shapes, drawn uniform on +-1/sqrt(last dimension), the same on every machine."""
    return {
        name: Seeded(0).uniform("probe", name, *key, shape=value.shape, bound=max(1, value.shape[-1]) ** -0.5)
        for name, value in tensors.items()
    }


def weakened(engine: Engine, tensors: Arrays, strength: float) -> dict[str, NDArray[np.floating]]:
    """Return adapters that do less: all tensors but the head's times ``strength``."""
    specs = engine.method.specs()
    return {name: value if specs[name].kind == "head" else value * strength for name, value in tensors.items()}


@contextmanager
def rounded_blocks(engine: Engine, seed: int = 0) -> Iterator[None]:
    """Have each block's output moved by up to one unit in the last place, and its gradient likewise."""
    generator = torch.Generator(engine.device).manual_seed(seed)

    def move(_module: Any, _given: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden, Tensor):
            return out  # of a kind of its own: its own rounding is not measured
        by = torch.rand(hidden.shape, generator=generator, device=engine.device) * 2.0 - 1.0
        moved = (hidden.float() * (1.0 + torch.finfo(hidden.dtype).eps * by)).to(hidden.dtype)
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    with ExitStack() as stack:
        for block in blocks_of(engine):
            stack.callback(block.register_forward_hook(move).remove)
        yield


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

    In 16 bits they are weakened until a rounding moves a loss by less than what counts as a fault: an update far larger
    than its layer's own output, as of a large ``method.alpha``, makes that much of a rounding. Where that does not help
    it is the base model that does, and they stay as they are.
    """
    drawn = [random_tensors(tensors, "group", g) for g in range(_GROUPS)]
    for strength in STRENGTHS if tolerance == _COARSE else ():
        own = [weakened(engine, one, strength) for one in drawn]
        alone = _alone(engine, rows, own)
        with rounded_blocks(engine):
            moved = np.abs(_alone(engine, rows, own) - alone) / np.maximum(1.0, np.abs(alone))
        if ROUNDINGS * moved.max() <= tolerance:
            return own, alone
    return drawn, _alone(engine, rows, drawn)


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
