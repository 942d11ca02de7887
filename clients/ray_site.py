"""A site whose work is done by trainers on Ray (:mod:`clients.pool`), which outlive Flower's processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, final

from clients.errors import WITHHELD, MemoryShortError, SiteError, TrainerLostError
from clients.pool import TrainerPool
from clients.shards import Pack
from clients.site import Description
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.reduce import Reduction, fold

if TYPE_CHECKING:
    from clients.worker import Worker

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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
        for pack, outcome in self._outcomes(
            lambda worker, part: worker.train(part), instruction, self._packs(instruction)
        ):
            if isinstance(outcome, Exception):
                yield from (Update(report) for report in _failed(pack, outcome))
            else:
                yield from outcome

    def reduce(self, instruction: Instruction) -> tuple[list[ClientReport], Reduction]:
        """Train the clients in packs, each reduced by its trainer; see :meth:`clients.site.Site.reduce`."""
        reports, total = fold(instruction, ())
        for pack, outcome in self._outcomes(
            lambda worker, part: worker.reduce(part), instruction, self._packs(instruction)
        ):
            if isinstance(outcome, Exception):
                reports += _failed(pack, outcome)
                continue
            own, reduction = outcome
            try:
                total.merge(reduction)
            except OverflowError as error:  # of the sum of packs, each of which was not too large
                own = [_refused(report, str(error)) for report in own]
            reports += own
        return reports, total

    def evaluate(self, instruction: Instruction) -> Iterator[ClientReport]:
        """Evaluate the clients in packs; see :meth:`clients.site.Site.evaluate`."""
        packs = [replace(pack, work=0.0) for pack in self._packs(instruction)]  # what was predicted is training
        for pack, outcome in self._outcomes(lambda worker, part: worker.report(part), instruction, packs):
            yield from _failed(pack, outcome) if isinstance(outcome, Exception) else outcome

    def _packs(self, instruction: Instruction) -> list[Pack]:
        return self._pool.packs(instruction.clients, instruction.pack)

    def _outcomes(
        self, work: Callable[[Worker, Instruction], Result], instruction: Instruction, packs: Sequence[Pack]
    ) -> Iterator[tuple[Pack, Result | Exception]]:
        """Have packs worked on; yield each with what became of it, the halves of one for which memory was short."""
        parts = [instruction.part(pack.clients) for pack in packs]
        outcomes = self._pool.outcomes(work, parts, packs=packs, server_round=instruction.round)
        for pack, outcome in zip(packs, outcomes, strict=True):
            if isinstance(outcome, MemoryShortError) and len(pack.clients) > 1:
                trainer = pack.trainer if outcome.trainer is None else outcome.trainer
                yield from self._outcomes(work, instruction, self._halves(pack, trainer, instruction.round))
            else:
                yield pack, outcome

    def _halves(self, pack: Pack, trainer: int, server_round: int) -> list[Pack]:
        """Return the halves of a pack for which a trainer had too little memory, for the same trainer."""
        middle = len(pack.clients) // 2
        halves = [Pack(trainer, part) for part in (pack.clients[:middle], pack.clients[middle:])]
        self._pool.memory_short(trainer, server_round, halves)
        return halves


def _failed(pack: Pack, error: Exception) -> list[ClientReport]:
    return [ClientReport.failed(client, _reason(error)) for client in pack.clients]


def _refused(report: ClientReport, reason: str) -> ClientReport:
    return replace(report, outcome=Outcome.FAILED, reason=reason) if report.outcome is Outcome.OK else report


def _reason(error: Exception) -> str:
    """Return what may leave of an error: words that were written for the server, and of any other none."""
    if isinstance(error, SiteError | TrainerLostError | MemoryShortError):
        return str(error)
    _logger.error("a trainer failed", exc_info=error)
    return WITHHELD
