"""What the audit's checks come to, and the statistics that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import chi2

ALARM = 1e-6
"""Chance of a false alarm of each statistical check, but for the attack on one run, which states its own."""


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        name: What was checked.
        passed: Whether it holds.
        numbers: The numbers behind it.
    """

    name: str
    passed: bool
    numbers: str


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings."""
    table = Table(title="audit")
    for column in ("check", "holds", "measured"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.name, "yes" if finding.passed else "NO", finding.numbers)
    console.print(table)


def flat(tensors: Mapping[str, NDArray[np.floating]]) -> NDArray[np.float64]:
    """Return all numbers of tensors, one after the other."""
    return np.concatenate([value.ravel() for value in tensors.values()])


def two_sided_chi_square(value: float, degrees: int) -> float:
    """Return how likely a value is as far from its expectation, under chi-square with so many degrees of freedom."""
    return float(2 * min(chi2.cdf(value, degrees), chi2.sf(value, degrees)))
