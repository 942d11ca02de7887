"""Shards of a machine or a cluster, one for each trainer, and how a round's clients are dealt to them in packs.

The same in simulations and at sites. A client counts by its predicted work, and a trainer by its measured speed: the
largest client goes first, to the trainer that would be done with it first. Who trains where changes a result by
rounding only, and where ``engine.pack`` is set not at all: packs are then made before they are dealt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_THREADS = 4  # threads of one trainer beyond which small models gain little on a CPU
MOST_CLIENTS: Final = 64
"""Clients of a pack whose size is chosen automatically, at most."""
_ALIKE = 0.8  # of the fastest: a clock's noise must not change who is packed with whom


@dataclass(frozen=True)
class Machine:
    """A node of a Ray cluster.

    Attributes:
        node: Ray's number of it; empty: this machine, before Ray runs.
        host: Its name, for people.
        cpus: CPU cores.
        gpus: GPUs.
    """

    node: str
    host: str
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Shard:
    """What one trainer owns.

    Attributes:
        threads: CPU threads.
        gpus: Share of a GPU; 0 on a machine without one.
        node: Ray's number of the node; empty: any.
        host: The machine's name.
    """

    threads: int
    gpus: float
    node: str = ""
    host: str = ""

    @property
    def words(self) -> str:
        """What it is of its machine."""
        gpu = "" if not self.gpus else "a GPU and " if self.gpus == 1 else f"{self.gpus:.2g} of a GPU and "
        return f"{gpu}{self.threads} thread(s)"


@dataclass(frozen=True)
class Pack:
    """Clients that one trainer trains together.

    Attributes:
        trainer: The trainer's number.
        clients: The clients, ascending.
        work: Their predicted work together, in tokens; in clients where no client's is known.
    """

    trainer: int
    clients: tuple[int, ...]
    work: float = 0.0


def plan_shards(machines: Sequence[Machine], wanted: int) -> list[Shard]:
    """Cut machines into shards, one for each trainer.

    Machines without a GPU are left out where others have one: a trainer of theirs would be waited for.

    Args:
        machines: The machines.
        wanted: ``engine.trainers``, on all machines together; 0: one a GPU, or on a CPU one for every four cores and
            one a machine at least.
    """
    used = [one for one in machines if one.gpus] or [one for one in machines if one.cpus] or list(machines)[:1]
    sizes = [one.gpus or max(1, one.cpus // _THREADS) for one in used]
    counts = _spread(wanted, [one.gpus or max(1, one.cpus) for one in used]) if wanted else sizes
    return [
        shard for one, count in zip(used, counts, strict=True) if count for shard in [_shard_of(one, count)] * count
    ]


def _shard_of(machine: Machine, trainers: int) -> Shard:
    """Return one of the equal shards of a machine."""
    # A share must fit on one GPU, and rounding must not make the last one too large.
    share = math.floor(1e4 / -(-trainers // machine.gpus)) / 1e4 if machine.gpus else 0.0
    return Shard(max(1, machine.cpus // trainers), share, machine.node, machine.host)


def _spread(wanted: int, sizes: Sequence[int]) -> list[int]:
    """Return how many of so many trainers each machine gets, by its size: the next goes where it has most room."""
    counts = [0] * len(sizes)
    for _ in range(wanted):
        counts[max(range(len(sizes)), key=lambda at: (sizes[at] / (counts[at] + 1), -at))] += 1
    return counts


def weights(speeds: Sequence[float]) -> list[float]:
    """Return the part of the fastest trainer's work that each trainer can do in the same time, in tenths.

    Trainers that differ by less than a clock's noise count alike, so that who is packed with whom does not depend on
    it; so does one that was not measured yet.

    Args:
        speeds: What each was measured to do in a second; 0: it was not measured; below 0: it is not there, and gets
            nothing. Where none is there, all count alike: one that comes back will do the work.
    """
    fastest = max(speeds, default=0.0)
    if all(speed < 0 for speed in speeds):
        return [1.0] * len(speeds)
    return [
        0.0
        if speed < 0
        else 1.0
        if not speed or speed >= _ALIKE * fastest
        else max(0.1, round(10 * speed / fastest) / 10)
        for speed in speeds
    ]


def deal(
    clients: Sequence[int], pack: int, shares: Sequence[float], work: Mapping[int, float] | None = None
) -> list[Pack]:
    """Deal clients to trainers in packs: the largest first, each to the trainer that would be done with it first.

    Args:
        clients: The clients.
        pack: Clients a pack (``engine.pack``), which are then packed before they are dealt, so that packs are the same
            whoever trains them; 0: what a trainer is dealt is cut into as few packs as may be.
        shares: The weight of each trainer (:func:`weights`); 0: it gets nothing.
        work: Predicted work by client; None: all are alike.

    Returns:
        Packs, those first that trainers begin with.
    """
    known = {client: 1.0 if work is None else work[client] for client in clients}
    ordered = sorted(clients, key=lambda client: (-known[client], client))
    units = _batches(ordered, pack or 1)
    load = [0.0] * len(shares)
    dealt: list[list[tuple[int, ...]]] = [[] for _ in shares]
    able = [trainer for trainer, share in enumerate(shares) if share > 0]
    for unit in units:
        size = sum(known[client] for client in unit)
        first = min(able, key=lambda trainer: ((load[trainer] + size) / shares[trainer], trainer))
        load[first] += size
        dealt[first].append(unit)
    packs: list[list[Pack]] = []
    for trainer, own in enumerate(dealt):
        parts = own if pack else _cut([client for unit in own for client in unit])
        packs.append([Pack(trainer, tuple(sorted(part)), sum(known[one] for one in part)) for part in parts])
    longest = max(map(len, packs), default=0)
    return [own[turn] for turn in range(longest) for own in packs if turn < len(own)]


def _cut(clients: Sequence[int]) -> list[tuple[int, ...]]:
    """Cut a trainer's clients, the largest first, into as few packs as may be, of nearly one size."""
    count = -(-len(clients) // MOST_CLIENTS)
    return _batches(clients, -(-len(clients) // count)) if count else []


def _batches(clients: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(clients[at : at + size]) for at in range(0, len(clients), size)]


def spread_rows(rows: int, shares: Sequence[float]) -> list[list[int]]:
    """Return for each trainer the places of the rows that it evaluates, alike ones in turn, by its weight."""
    turns = [pack.trainer for pack in deal(range(round(10 * sum(shares))), 1, shares)]
    return [[row for row in range(rows) if turns[row % len(turns)] == trainer] for trainer in range(len(shares))]
