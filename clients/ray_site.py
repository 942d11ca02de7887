"""A site whose work is done by trainers on Ray (:mod:`clients.pool`), which outlive Flower's processes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import final

from clients.errors import WITHHELD, MemoryShortError, SiteError, TrainerLostError
from clients.pool import TrainerPool
from clients.shards import Pack
from clients.site import Description
from fedlora.exchange import ClientReport, Instruction, Update

_logger = logging.getLogger(__name__)


@final
class RaySite:
    """A :class:`clients.site.Site` on a pool of trainers.

    Args:
        pool: The trainers.
    """

    def __init__(self, pool: TrainerPool) -> None:
        self._pool = pool

    def describe(self) -> Description:
        """Return the description of a trainer; see :meth:`clients.site.Site.describe`."""
        (outcome,) = self._pool.outcomes(lambda worker, _: worker.describe(), [None])
        if isinstance(outcome, Exception):
            raise SiteError(_reason(outcome)) from None
        return outcome

    def train(self, instruction: Instruction) -> Iterator[Update]:
        """Train the clients in packs; see :meth:`clients.site.Site.train`."""
        yield from self._train(instruction, self._pool.packs(instruction.clients, instruction.pack))

    def _train(self, instruction: Instruction, packs: list[Pack]) -> Iterator[Update]:
        parts = [instruction.part(pack.clients) for pack in packs]
        outcomes = self._pool.outcomes(
            lambda worker, part: worker.train(part), parts, packs=packs, server_round=instruction.round
        )
        for pack, outcome in zip(packs, outcomes, strict=True):
            if isinstance(outcome, MemoryShortError) and len(pack.clients) > 1:
                yield from self._train(instruction, self._halves(pack, instruction.round))
            elif isinstance(outcome, Exception):
                yield from (Update(ClientReport.failed(client, _reason(outcome))) for client in pack.clients)
            else:
                yield from outcome

    def _halves(self, pack: Pack, server_round: int) -> list[Pack]:
        """Return the halves of a pack for which a trainer had too little memory, for the same trainer."""
        middle = len(pack.clients) // 2
        halves = [replace(pack, clients=part, work=0.0) for part in (pack.clients[:middle], pack.clients[middle:])]
        self._pool.memory_short(pack.trainer, server_round, halves)
        return halves

    def evaluate(self, instruction: Instruction) -> Iterator[ClientReport]:
        """Evaluate the clients in packs; see :meth:`clients.site.Site.evaluate`."""
        packs = [replace(pack, work=0.0) for pack in self._pool.packs(instruction.clients, instruction.pack)]
        parts = [instruction.part(pack.clients) for pack in packs]
        outcomes = self._pool.outcomes(
            lambda worker, part: worker.report(part), parts, packs=packs, server_round=instruction.round
        )
        for pack, outcome in zip(packs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                yield from (ClientReport.failed(client, _reason(outcome)) for client in pack.clients)
            else:
                yield from outcome


def _reason(error: Exception) -> str:
    """Return what may leave of an error: words that were written for the server, and of any other none."""
    if isinstance(error, SiteError | TrainerLostError | MemoryShortError):
        return str(error)
    _logger.error("a trainer failed", exc_info=error)
    return WITHHELD
