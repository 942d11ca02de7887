"""Data parallelism in a trainer's process: its CPU threads train clients of their own, on the same weights.

Two threads in the matrix products of a small model are half as fast again as one, and twice as busy; two that compute
packs of their own are nearly twice as fast as one. Each has its own modules around the base model's weights, since a
pack's factors are in the modules while it computes. The shares depend on the work alone, never on who is faster.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.config import TrainConfig
from fedlora.engine import ClientResult, ClientWork, Engine, evaluate, train_pack
from fedlora.engine.local import NO_TERMS
from fedlora.engine.work import Arrays
from fedlora.local_terms import LocalTerms
from fedlora.privacy.step import PrivateStep
from fedlora.tasks import Rows

# Below, Python's own part of a step, which one thread at a time can do, is what takes the time.
_LEAST_PARAMETERS = 2**22
_TOGETHER = 0.55  # t threads in the same products are t**0.55 times as fast as one: 1.47 times where there are two

Places = NDArray[np.int64]
T = TypeVar("T")


@final
class DataParallel:
    """Trains packs and evaluates rows with all of a trainer's threads.

    Args:
        engine: The engine.
        threads: CPU threads.
    """

    def __init__(self, engine: Engine, threads: int) -> None:
        pays = engine.device.type == "cpu" and engine.base.structure.num_parameters >= _LEAST_PARAMETERS
        assert not (pays and engine.grouped.unpadded), "attention knows one batch at a time"
        self._threads = threads
        self._engines = [engine, *(_replica(engine) for _ in range(threads - 1 if pays else 0))]

    def train(
        self,
        works: Sequence[ClientWork],
        common: Arrays,
        config: TrainConfig,
        private: PrivateStep | None = None,
        *,
        terms: LocalTerms = NO_TERMS,
        shared: frozenset[str] = frozenset(),
    ) -> list[ClientResult]:
        """Train clients, each thread a pack of some of them; arguments as of :func:`fedlora.engine.train_pack`."""

        def part(engine: Engine, places: Places) -> list[ClientResult]:
            own = private and replace(private, randoms=[private.randoms[g] for g in places])
            return train_pack(engine, [works[g] for g in places], common, config, own, terms=terms, shared=shared)

        costs = [sum(int(work.examples.cost[batch].sum()) for batch in work.batches) for work in works]
        shares = self._shares(costs)
        results = [result for share in self._run(part, shares) for result in share]
        return [results[at] for at in np.argsort(np.concatenate(shares))]

    def evaluate(
        self,
        common: Arrays,
        rows: Rows,
        numbers: Sequence[int],
        *,
        own: Sequence[Arrays] = ({},),
        group: NDArray[np.int64] | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        """Return the facts of rows, each thread's of some of them; arguments as of :func:`fedlora.engine.evaluate`."""

        def part(engine: Engine, places: Places) -> dict[str, NDArray[np.float64]]:
            chosen = [numbers[place] for place in places]
            return evaluate(engine, common, rows, chosen, own=own, group=None if group is None else group[places])

        shares = self._shares(rows.cost[list(numbers)].tolist())
        parts = self._run(part, shares)
        order = np.argsort(np.concatenate(shares))
        return {name: np.concatenate([facts[name] for facts in parts])[order] for name in parts[0]}

    def _shares(self, costs: Sequence[int]) -> list[Places]:
        """Return for each thread the places of what it does, the most costly dealt first; none goes without.

        Where most of the work is one client's, all threads do all of it together.
        """
        shares: list[list[int]] = [[] for _ in range(max(1, min(len(self._engines), len(costs))))]
        load = [(0, thread) for thread in range(len(shares))]
        for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
            least, thread = load[0]
            shares[thread].append(place)
            heapq.heapreplace(load, (least + max(1, costs[place]), thread))
        gained = (self._threads / max(1, self._threads // len(shares))) ** _TOGETHER  # by all threads, over a share's
        if max(load)[0] * gained > sum(done for done, _ in load):
            return [np.arange(len(costs))]
        return [np.array(sorted(share), dtype=np.int64) for share in shares]

    def _run(self, part: Callable[[Engine, Places], T], shares: Sequence[Places]) -> list[T]:
        if len(shares) == 1:
            return [part(self._engines[0], shares[0])]

        def run(engine: Engine, places: Places) -> T:
            torch.set_num_threads(max(1, self._threads // len(shares)))  # of this thread
            return part(engine, places)

        try:
            with ThreadPoolExecutor(len(shares)) as pool:
                return list(pool.map(run, self._engines, shares))
        finally:
            torch.set_num_threads(self._threads)


def _replica(engine: Engine) -> Engine:
    """Return an engine with modules of its own around the same weights."""
    model = engine.base.model
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    grouped = copy.deepcopy(engine.grouped, weights)
    return replace(engine, grouped=grouped, base=replace(engine.base, model=grouped.model))
