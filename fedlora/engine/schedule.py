"""The order of a pack's work, planned on the host: which clients step together, which rows share a pass.

Every client's step can be taken at any time after its last one, since no client waits for another. So each turn of a
pack takes those clients that have most steps left, as many as fill one forward pass: clients with little work wait and
take the places of those that have finished, and the device is full to the end although clients differ. Within a turn
rows are sorted by cost and cut where padding would begin to cost more than it saves.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedlora.engine.work import ClientWork

_PADDING = 0.08  # of a pass, beyond which its rows are cut in two
_LEAST = 0.25  # of a full pass: smaller ones are padded rather than cut
_OUTSIDE = 4  # times as much as a full pass may be outside of the blocks, which alone are without padding


@final
@dataclass(frozen=True)
class Turn:
    """One step of some clients of a pack.

    Attributes:
        groups: The clients' places in the pack, ascending, [a].
        steps: The step that each takes, from 0, [a].
        rows: Row numbers at their clients, [n], sorted by client.
        slot_n: For each row its client's place in ``groups``, [n].
        cost_n: Its cost, [n].
    """

    groups: NDArray[np.int64]
    steps: NDArray[np.int64]
    rows: NDArray[np.int64]
    slot_n: NDArray[np.int64]
    cost_n: NDArray[np.int64]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Rows of each client, [a]."""
        return np.bincount(self.slot_n, minlength=len(self.groups))


def turns(works: Sequence[ClientWork], fill: int) -> Iterator[Turn]:
    """Yield the turns of a pack's round, each planned when it is asked for: a GPU does not wait for the plan of all.

    Args:
        works: What the clients do.
        fill: Cost of rows that fills a forward pass; a turn takes clients until it has that much.
    """
    waiting = [(-len(work.batches), g, 0) for g, work in enumerate(works) if work.batches]
    heapq.heapify(waiting)
    while waiting:
        taken: list[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]] = []
        cost = 0
        while waiting:
            _, g, step = waiting[0]
            batch = np.asarray(works[g].batches[step], dtype=np.int64)
            cost_n = works[g].examples.cost[batch]
            cost += int(cost_n.sum())
            if taken and cost > fill:
                break
            heapq.heappop(waiting)
            taken.append((g, step, batch, cost_n))
        groups, steps, batches, costs = zip(*sorted(taken, key=itemgetter(0)), strict=True)
        yield Turn(
            groups=np.array(groups, dtype=np.int64),
            steps=np.array(steps, dtype=np.int64),
            rows=np.concatenate(batches),
            slot_n=np.repeat(np.arange(len(batches)), [len(batch) for batch in batches]),
            cost_n=np.concatenate(costs),
        )
        for g, step in zip(groups, steps, strict=True):
            left = len(works[g].batches) - step - 1
            if left:
                heapq.heappush(waiting, (-left, g, step + 1))


def passes(
    cost_n: NDArray[np.int64], part_n: NDArray[np.int64], most: int, rows: int, *, padded: bool = True
) -> list[NDArray[np.int64]]:
    """Cut rows into forward passes within the bound, of such rows as may go together.

    With padding, rows of a pass are alike in cost; without, they come in their order.

    Args:
        cost_n: Of each row.
        part_n: Rows of different parts never go together.
        most: Bound on the cost of a pass, which is with padding its rows times the cost of the longest; one row always
            fits.
        rows: Bound on its rows.
        padded: Whether there is padding.

    Returns:
        Positions in ``cost_n``, ascending within a pass; every position once.
    """
    n, one_part = len(cost_n), bool((part_n == part_n[:1]).all())
    whole = max(int(cost_n.sum()), n * int(cost_n.max(initial=0)) // _OUTSIDE)
    if not padded and one_part and 0 < n <= rows and whole <= most:
        return [np.arange(n)]  # at once: it is the usual case, and a GPU waits for the first pass
    order = np.lexsort((np.arange(len(cost_n)), -cost_n if padded else 0 * cost_n, part_n))
    costs, parts = cost_n[order].tolist(), part_n[order].tolist()
    starts: list[int] = []
    count = longest = real = 0  # of the pass that is being filled
    for at, (cost, part) in enumerate(zip(costs, parts, strict=True)):
        before, longest = longest, max(longest, cost)
        rectangle = longest * (count + 1)
        whole = rectangle if padded else max(real + cost, rectangle // _OUTSIDE)
        full = whole > most or count == rows or not starts or part != parts[starts[-1]]
        wasteful = padded and before * count >= _LEAST * most and whole - real - cost > _PADDING * whole
        if full or wasteful:
            starts.append(at)
            count, longest, real = 0, cost, 0
        count, real = count + 1, real + cost
    return [np.sort(order[start:end]) for start, end in itertools.pairwise([*starts, len(order)])]
