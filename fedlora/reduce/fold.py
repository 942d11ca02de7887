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


def fold(instruction: Instruction, updates: Iterable[Update]) -> tuple[list[ClientReport], Reduction]:
    """Return a report of each client, and the updates that may be used, reduced as the instruction says."""
    reports, reduction = [], REDUCTIONS[instruction.reduction]()
    for update in updates:
        report = update.report
        if report.outcome is Outcome.OK and not report.steps:
            report = replace(report, outcome=Outcome.FAILED, reason="it has no training rows")
        if report.outcome is Outcome.OK:
            try:
                reduction.add(update, report.examples if instruction.weights == "examples" else 1)
            except OverflowError as error:
                report = replace(report, outcome=Outcome.FAILED, reason=str(error))
        reports.append(report)
    return reports, reduction
