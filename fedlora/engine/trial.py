"""A way to compute, tried beside the plain one: the losses and gradients of rows that are nobody's.

The plain way is the reference, with all tensors drawn at random. Where another way does not give the same, or cannot be
tried, the plain one stays, and the log says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self, final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.config import TrainConfig
from fedlora.engine.apart import random_tensors
from fedlora.engine.core import Engine
from fedlora.engine.pack import Pack
from fedlora.engine.rounding import ROUNDINGS, told, weakened
from fedlora.engine.work import Arrays, ClientWork
from fedlora.tasks import Rows

Way = Callable[[Engine], tuple[Engine, Callable[[], None]] | None]
"""From an engine one that computes in another way, and what takes that back; None: there is none for this model."""

Numbers = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Losses, and gradients."""

_logger = logging.getLogger(__name__)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 5e-2  # of 16 bits, where the model's own rounding is less
_COARSEST = 0.25  # beyond this a difference is called an error, whatever the rounding
_COSTS = (2048, 4096)  # of passes between which memory is measured
_SHARE = 0.7  # of the free memory that a pass may take; the rest is the pack's own


@final
@dataclass(frozen=True)
class Plain:
    """What the plain way gives, and how far from it a fast one may be.

    In 16 bits the same arithmetic in another order gives other numbers, the more so the deeper and the wider a model is
    (measured: 0.5 % of MiniLM's gradients, 7 % of a Llama-2-7B's). How much a model makes of a rounding is found by
    rounding: the tolerance does not have to be guessed. It is found for losses and for gradients, which move far more.

    Attributes:
        numbers: See :func:`numbers`.
        tolerances: The largest relative difference in norm, of losses and of gradients.
        strength: What the random tensors were multiplied with, see :func:`fedlora.engine.rounding.told`.
    """

    numbers: Numbers
    tolerances: tuple[float, float]
    strength: float = 1.0

    @classmethod
    def of(cls, engine: Engine, tensors: Arrays) -> Self:
        """Return what an engine gives in which nothing is fast yet.

        Args:
            engine: The engine.
            tensors: All of the method's tensors, for their shapes.
        """
        fine = _TOLERANCE.get(engine.compute)
        if fine is not None:
            return cls(numbers(engine, tensors), (fine, fine))
        strength, found, (losses, grads) = told(engine, partial(numbers, engine, tensors), _apart, _COARSEST)
        return cls(found, (_coarse(losses), _coarse(grads)), strength)


def _coarse(moved: float) -> float:
    """Return how far off numbers of 16 bits may be, of which one rounding of each block's output moves so many."""
    return min(max(_COARSE, ROUNDINGS * moved), _COARSEST)


def tried(engine: Engine, way: Way, tensors: Arrays, plain: Plain, *, first: int = 0) -> Engine:
    """Return the engine in another way where that gives what the plain one does, else as it is.

    Args:
        engine: The engine.
        way: The way.
        tensors: All of the method's tensors, for their shapes.
        plain: What the plain way gives.
        first: Cost of a pass that is taken before, if any: kernels are chosen by the first shapes that are seen, and
            those of small passes are not the best of large ones.
    """
    began, name = time.perf_counter(), way.__name__.removeprefix("_with_")
    undo: Callable[[], None] | None = None
    try:
        other = way(engine)
        if other is None:
            return engine
        changed, undo = other
        if first:
            _one_pass(changed, tensors, first)
        off = _apart(numbers(changed, tensors, plain.strength), plain.numbers)
        fits = all(one <= most for one, most in zip(off, plain.tolerances, strict=True))
    except Exception as error:  # whatever a model's own code raises: the plain way is there
        _logger.warning("%s: the plain way computes, this model does not take the fast one (%s)", name, error)
    else:
        words = "{:.2g} in losses and {:.2g} in gradients".format(*off)
        if fits:
            _logger.info("%s: off by %s, tried in %.1f s", name, words, time.perf_counter() - began)
            return changed
        words += " where {:.2g} and {:.2g} are rounding".format(*plain.tolerances)
        _logger.warning("%s: the plain way computes, the fast one is off by %s for this model", name, words)
    if undo is not None:
        undo()
    return engine


def numbers(engine: Engine, tensors: Arrays, strength: float = 1.0) -> Numbers:
    """Return the losses of two clients on rows that are nobody's, and their gradients, short and long ones.

    Args:
        engine: The engine.
        tensors: All of the method's tensors, for their shapes.
        strength: What random ones are multiplied with.
    """
    losses, grads = [], []
    for long in (False, True):
        rows = engine.task.made_up_rows(long=long)
        pack = _pack(engine, tensors, rows, [np.arange(len(rows)), np.arange(1, len(rows))], strength)
        grads += [pack.backward(turn).double().cpu().numpy().ravel() for turn in pack.turns]
        losses.append(pack.losses())
    return np.concatenate(losses), np.concatenate(grads)


def _pack(
    engine: Engine, tensors: Arrays, rows: Rows, batches: Sequence[NDArray[np.int64]], strength: float = 1.0
) -> Pack:
    """Return clients of random tensors, each with one step on its batch of these rows."""
    works = [
        ClientWork(g, rows, len(batch), [batch], weakened(engine, random_tensors(tensors, "group", g), strength))
        for g, batch in enumerate(batches)
    ]
    return Pack(engine, works, {}, TrainConfig(learning_rate=0.01))


def _apart(found: Numbers, expected: Numbers) -> tuple[float, float]:
    """Return the relative differences in norm of losses and of gradients; NaN where one is."""
    losses, grads = (
        float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
        for a, b in zip(found, expected, strict=True)
    )
    return losses, grads


def _one_pass(engine: Engine, tensors: Arrays, cost: int) -> tuple[int, NDArray[np.float64]]:
    """Take the gradients of two clients in a pass of about this cost; return its cost, and its bytes on each GPU.

    Args:
        engine: The engine.
        tensors: All of the method's tensors, for their shapes.
        cost: The cost.
    """
    rows = engine.task.made_up_rows(long=True)
    longest = len(rows) - 1
    count = max(1, cost // (2 * int(rows.cost[longest])))
    whole = replace(engine, max_cost=cost + int(rows.cost[longest]))
    pack = _pack(whole, tensors, rows, [np.full(count, longest)] * 2)
    before = np.array([float(torch.cuda.memory_allocated(card)) for card in engine.cards])
    for card in engine.cards:
        torch.cuda.reset_peak_memory_stats(card)
    for turn in pack.turns:
        pack.backward(turn)
    peak = np.array([float(torch.cuda.max_memory_allocated(card)) for card in engine.cards])
    return 2 * count * int(rows.cost[longest]), peak - before


def fitting(engine: Engine, tensors: Arrays) -> int:
    """Return the cost of a pass that fits into the free memory, by what passes of two costs take; the engine's at most.

    Of several GPUs the one decides that is full first.

    What a pass holds for the backward pass grows with its cost, and nothing else of it does.
    """
    _one_pass(engine, tensors, _COSTS[0])  # the first time anything may be made that stays
    (small, low), (large, high) = (_one_pass(engine, tensors, cost) for cost in _COSTS)
    slopes = np.maximum((high - low) / (large - small) if large > small else high / large, 1.0)
    torch.cuda.empty_cache()
    free = np.array([_free(card) for card in engine.cards])
    at = int((free / slopes).argmin())
    _logger.info("a pass takes %.0f kB a token, %.1f GB are free", slopes[at] / 1e3, free[at] / 1e9)
    return max(1, min(engine.max_cost, int(_SHARE * free[at] / slopes[at])))


def _free(card: torch.device) -> float:
    """Return the bytes of a GPU that this process may still take, of which others may have a part."""
    free, total = torch.cuda.mem_get_info(card)
    return min(free, torch.cuda.get_per_process_memory_fraction(card) * total - torch.cuda.memory_reserved(card))
