"""A node's part of a reduction: its clients' updates as they come, each with the report that goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.reduce.base import Reduction
from fedlora.reduce.mean import WeightedMean
from fedlora.reduce.one_by_one import OneByOne
from fedlora.registry import Registry

REDUCTIONS: Registry[type[Reduction]] = Registry("reduction")
for _reduction in (WeightedMean, OneByOne):
    REDUCTIONS.register(_reduction.name)(_reduction)


_TOGETHER = 64  # updates that are added at once, and so are in memory at once


def fold(instruction: Instruction, updates: Iterable[Update]) -> tuple[list[ClientReport], Reduction]:
    """Return a report of each client, and the updates that may be used, reduced as the instruction says.

    Args:
        instruction: The instruction that the updates answer.
        updates: The clients' updates, as they come.
    """
    reports, reduction = list[ClientReport](), REDUCTIONS[instruction.reduction]()
    waiting: list[tuple[int, Update, int]] = []
    for update in updates:
        report = update.report
        if report.outcome is Outcome.OK and not report.steps:
            report = replace(report, outcome=Outcome.FAILED, reason="it has no training rows")
        if report.outcome is Outcome.OK:
            waiting.append((len(reports), update, report.examples if instruction.weights == "examples" else 1))
        reports.append(report)
        if len(waiting) == _TOGETHER:
            _add(reduction, waiting, reports)
            waiting = []
    _add(reduction, waiting, reports)
    return reports, reduction


def _add(reduction: Reduction, waiting: list[tuple[int, Update, int]], reports: list[ClientReport]) -> None:
    """Add updates; where that fails, one by one, with the report of each that cannot be added saying why."""
    if not waiting:
        return
    try:
        reduction.add_all([(update, weight) for _, update, weight in waiting])
    except OverflowError:
        for at, update, weight in waiting:
            try:
                reduction.add(update, weight)
            except OverflowError as error:
                reports[at] = replace(reports[at], outcome=Outcome.FAILED, reason=str(error))
