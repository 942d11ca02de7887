"""The shard plan of a run: which trainer is where, with what of a machine, and what of the first round it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clients.shards import Pack, Shard
from clients.site import Speed
from fedlora.reports.format import human_bytes, human_time

_NAMED = 16  # clients of a trainer that are named; of more, how many they are
_SHOWN = 16  # trainers that have a line each


def shards_record(shards: Sequence[Shard], packs: Sequence[Pack], speed: Speed | None = None) -> list[dict[str, Any]]:
    """Return the shard plan as plain values, for ``plan.json``.

    Args:
        shards: What each trainer owns.
        packs: The packs of the first round.
        speed: What a probe measured; None: there was none.
    """
    whole = sum(pack.work for pack in packs) or 1.0
    rows = []
    for number, shard in enumerate(shards):
        own = [pack for pack in packs if pack.trainer == number]
        work = sum(pack.work for pack in own)
        expected = {} if speed is None else {"seconds": work * speed.train_s, "memory_bytes": speed.memory_bytes}
        rows.append(
            {
                "trainer": number,
                "host": shard.host,
                "node": shard.node,
                "threads": shard.threads,
                "gpus": shard.gpus,
                "packs": len(own),
                "clients": sorted(client for pack in own for client in pack.clients),
                "work": work / whole,
                **expected,
            }
        )
    return rows


def shards_lines(shards: Sequence[Shard], packs: Sequence[Pack]) -> list[str]:
    """Return the shard plan in words, a line a trainer; see :func:`shards_record`."""
    lines = []
    for row, shard in list(zip(shards_record(shards, packs), shards, strict=True))[:_SHOWN]:
        clients = row["clients"]
        named = f"client(s) {', '.join(map(str, clients))}" if 0 < len(clients) <= _NAMED else f"{len(clients)} clients"
        lines.append(
            f"trainer {row['trainer']} on {row['host'] or 'this machine'}, {shard.words}: {named} in {row['packs']} "
            f"pack(s), {row['work']:.0%} of the work of round 1"
        )
    return [*lines, *([f"and {len(shards) - _SHOWN} more trainers"] if len(shards) > _SHOWN else [])]


def busiest(shards: Sequence[Shard], packs: Sequence[Pack], speed: Speed) -> list[str]:
    """Return in words what a round takes of the trainer that has most to do, by a probe."""
    rows = shards_record(shards, packs, speed)
    if not rows:
        return []
    most = max(rows, key=lambda row: row["work"])
    return [
        f"the trainer with most of it (trainer {most['trainer']}) trains {human_time(most['seconds'])} in round 1, and "
        f"has had {human_bytes(most['memory_bytes'])} of memory in the probe"
    ]
