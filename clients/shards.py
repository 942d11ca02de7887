"""Shards of a machine or cluster, one for each trainer, and packs of clients: the same in simulations and at sites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_THREADS = 4  # threads of one trainer beyond which small models gain little on a CPU


@dataclass(frozen=True)
class Shard:
    """What one trainer owns.

    Attributes:
        threads: CPU threads.
        gpus: Share of a GPU; 0 on a machine without one.
    """

    threads: int
    gpus: float


def plan_shards(resources: Mapping[str, float], wanted: int) -> list[Shard]:
    """Cut a machine into shards, one for each trainer.

    Args:
        resources: ``CPU`` and ``GPU`` counts, as Ray reports them.
        wanted: ``engine.trainers``; 0: one a GPU, or on a CPU one for every four cores.
    """
    cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
    trainers = wanted or gpus or max(1, cpus // _THREADS)
    # A share must fit on one GPU, and rounding must not make the last one too large.
    share = math.floor(1e4 / -(-trainers // gpus)) / 1e4 if gpus else 0.0
    return [Shard(threads=max(1, cpus // trainers), gpus=share)] * trainers


def split_packs(clients: Sequence[int], pack: int, trainers: int) -> list[tuple[int, ...]]:
    """Cut a node's clients, ascending, into packs.

    Args:
        clients: The clients.
        pack: Clients a pack (``engine.pack``); 0: as many as give every trainer one pack, 64 at most.
        trainers: Number of trainers.
    """
    ordered = sorted(clients)
    size = pack or max(1, min(64, -(-len(ordered) // trainers)))
    return [tuple(ordered[at : at + size]) for at in range(0, len(ordered), size)]
