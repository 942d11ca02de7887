"""Shards of a machine or a cluster, one for each trainer, and how a round's clients are dealt to them in packs.

The same in simulations and at sites. A shard has a GPU, or as many as a base model takes that is too large for one. A
client counts by its predicted work, and a trainer by its measured speed: the largest client goes first, to the trainer
that would be done with it first. Who trains where changes a result by rounding only, and where ``engine.pack`` is set
not at all: packs are then made before they are dealt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedlora.config import ConfigError
from fedlora.reports.format import human_bytes

_THREADS = 4  # threads of one trainer beyond which small models gain little on a CPU
_WEIGHTS = 0.8  # of a GPU's memory, for a base model's weights: the rest is for a pass, and for a small pack
MOST_CLIENTS: Final = 64
"""Clients of a pack whose size is chosen automatically, at most; on a GPU see :func:`most_clients`."""
_MOST_ON_GPU = 256  # more gain nothing that was measured, and fewer lose half the speed where a step has 64 tokens
_STACKS = 0.3  # of a GPU's memory beside the base model, for what a pack trains: the engine gives passes the rest
# Packs of a trainer in a round, where each has as many clients: a loss repeats one, and results come back meanwhile.
_PACKS, _WORTH_A_PACK = 4, 128
_ALIKE = 0.8  # of the fastest: a clock's noise must not change who is packed with whom


@dataclass(frozen=True)
class Machine:
    """A node of a Ray cluster.

    Attributes:
        node: Ray's number of it; empty: this machine, before Ray runs.
        host: Its name, for people.
        cpus: CPU cores.
        gpus: GPUs.
        gpu_bytes: Memory of the smallest of them; 0: it is not known.
    """

    node: str
    host: str
    cpus: int
    gpus: int
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Shard:
    """What one trainer owns.

    Attributes:
        threads: CPU threads.
        gpus: Share of a GPU, or several whole ones; 0 on a machine without one.
        node: Ray's number of the node; empty: any.
        host: The machine's name.
        gpu_bytes: Memory of each GPU; 0: it is not known.
    """

    threads: int
    gpus: float
    node: str = ""
    host: str = ""
    gpu_bytes: int = 0

    @property
    def cards(self) -> int:
        """GPUs that the base model is spread over; 1 also where it has a part of one, or none."""
        return max(1, int(self.gpus))

    @property
    def words(self) -> str:
        """What it is of its machine."""
        gpu = "a GPU and " if self.gpus == 1 else f"{self.gpus:.2g} of a GPU and " if self.gpus else ""
        gpu = f"{self.cards} GPUs, over which the base model is spread, and " if self.cards > 1 else gpu
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


def plan_shards(machines: Sequence[Machine], wanted: int, *, gpus: int = 1, weights: int = 0) -> list[Shard]:
    """Cut machines into shards, one for each trainer.

    Machines without a GPU are left out where others have one: a trainer of theirs would be waited for. So are those
    with fewer GPUs than a shard takes.

    Args:
        machines: The machines.
        wanted: ``engine.trainers``, on all machines together; 0: as many as have ``gpus`` GPUs each, or on a CPU one
            for every four cores and one a machine at least.
        gpus: ``engine.gpus``, of a shard; 0: as few as the base model fits into.
        weights: Predicted bytes of the base model's weights; 0: they are not known, and fit into one GPU.

    Raises:
        ConfigError: No machine has as many GPUs, or not enough of them for so many trainers.
    """
    used = [one for one in machines if one.gpus] or [one for one in machines if one.cpus] or list(machines)[:1]
    taken = [gpus or _cards(one, weights) for one in used]
    if max(taken) > 1:
        if gpus > max(one.gpus for one in used):
            most = max(one.gpus for one in used)
            raise ConfigError(f"engine.gpus = {gpus}: no machine has more than {most} GPU(s); lower it.")
        able = [(one, cards) for one, cards in zip(used, taken, strict=True) if cards <= one.gpus]
        if not able:
            largest = max(used, key=lambda one: one.gpus * one.gpu_bytes)
            raise ConfigError(
                f"model.name: the base model's weights take {human_bytes(weights)}, and no machine has GPUs for them "
                f"(the largest has {largest.gpus} of {human_bytes(largest.gpu_bytes)}); set engine.dtype = 'bfloat16' "
                "or model.quantization, or use a machine with more. Where they do fit, set engine.gpus."
            )
        used, taken = [one for one, _ in able], [cards for _, cards in able]
    sizes = [one.gpus // cards or max(1, one.cpus // _THREADS) for one, cards in zip(used, taken, strict=True)]
    rooms = [one.gpus // cards or max(1, one.cpus) for one, cards in zip(used, taken, strict=True)]
    counts = _spread(wanted, rooms) if wanted else sizes
    if any(cards > 1 and count > size for cards, count, size in zip(taken, counts, sizes, strict=True)):
        raise ConfigError(
            f"engine.trainers = {wanted}: the base model takes {max(taken)} GPUs of a trainer (engine.gpus), and the "
            f"machines have enough for {sum(sizes)} trainer(s); lower it to that."
        )
    return [
        shard
        for one, count, cards in zip(used, counts, taken, strict=True)
        if count
        for shard in [_shard_of(one, count, cards)] * count
    ]


def _cards(machine: Machine, weights: int) -> int:
    """Return how many of a machine's GPUs a base model takes: as few as leave room for training, all if they must."""
    if not machine.gpu_bytes:
        return 1
    cards = max(1, math.ceil(weights / (_WEIGHTS * machine.gpu_bytes)))
    tight = cards > machine.gpus and weights <= machine.gpus * machine.gpu_bytes
    return machine.gpus if tight else cards


def _shard_of(machine: Machine, trainers: int, cards: int) -> Shard:
    """Return one of the equal shards of a machine."""
    # A share must fit on one GPU, and rounding must not make the last one too large.
    share = math.floor(1e4 / -(-trainers // machine.gpus)) / 1e4 if machine.gpus else 0.0
    threads = max(1, machine.cpus // trainers)
    return Shard(threads, float(cards) if cards > 1 else share, machine.node, machine.host, machine.gpu_bytes)


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
    clients: Sequence[int],
    pack: int,
    shares: Sequence[float],
    work: Mapping[int, float] | None = None,
    most: int = MOST_CLIENTS,
) -> list[Pack]:
    """Deal clients to trainers in packs: the largest first, each to the trainer that would be done with it first.

    Args:
        clients: The clients.
        pack: Clients a pack (``engine.pack``), which are then packed before they are dealt, so that packs are the same
            whoever trains them; 0: what a trainer is dealt is cut into few packs.
        shares: The weight of each trainer (:func:`weights`); 0: it gets nothing.
        work: Predicted work by client; None: all are alike.
        most: Clients of a pack of an automatic size, at most.

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
        parts = own if pack else _cut([client for unit in own for client in unit], most)
        packs.append([Pack(trainer, tuple(sorted(part)), sum(known[one] for one in part)) for part in parts])
    longest = max(map(len, packs), default=0)
    return [own[turn] for turn in range(longest) for own in packs if turn < len(own)]


def most_clients(shards: Sequence[Shard], weights: int, client_bytes: int) -> int:
    """Return how many clients a pack of an automatic size may have on each of these shards.

    Args:
        shards: The shards.
        weights: Predicted bytes of the base model's weights.
        client_bytes: Of a client in a pack (:func:`fedlora.workload.pack_bytes`).
    """
    if not all(shard.gpus and shard.gpu_bytes for shard in shards) or not shards:
        return MOST_CLIENTS
    rooms = [min(1.0, shard.gpus) * shard.gpu_bytes - weights / shard.cards for shard in shards]
    return max(1, min(_MOST_ON_GPU, int(_STACKS * min(rooms) / max(1, client_bytes))))


def _cut(clients: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Cut a trainer's clients, the largest first, into a few packs of nearly one size, or one if they are few."""
    count = max(-(-len(clients) // most), min(_PACKS, len(clients) // _WORTH_A_PACK))
    return _batches(clients, -(-len(clients) // count)) if count else []


def _batches(clients: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(clients[at : at + size]) for at in range(0, len(clients), size)]


def spread_rows(rows: int, shares: Sequence[float]) -> list[list[int]]:
    """Return for each trainer the places of the rows that it evaluates, alike ones in turn, by its weight."""
    turns = [pack.trainer for pack in deal(range(round(10 * sum(shares))), 1, shares)]
    return [[row for row in range(rows) if turns[row % len(turns)] == trainer] for trainer in range(len(shares))]
