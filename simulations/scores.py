"""Clients' scores: each one's metrics on its own rows, and what they come to together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlora.exchange import ClientReport
from fedlora.tasks import Task


def sums_of(report: ClientReport) -> dict[str, float]:
    """Return the sums that a client reports, with the number of rows that they are over as ``examples``."""
    return {"examples": float(report.examples), **report.metrics}


def score(task: type[Task], client: int, sums: Mapping[str, float]) -> dict[str, Any]:
    """Return a client's metrics, given the sums of its rows' facts with their number as ``examples``."""
    examples = sums["examples"]
    means = {name: value / examples for name, value in sums.items() if name != "examples"}
    return {"client": client, "examples": int(examples), **task.metrics(means)}


def summarise(scores: list[dict[str, Any]], measure: str, higher_is_better: bool) -> dict[str, float]:
    """Return the mean over clients and the mean over the worst tenth of them."""
    values = np.sort([score[measure] for score in scores])
    worst = values if higher_is_better else values[::-1]
    return {
        f"clients_{measure}": float(values.mean()),
        f"clients_{measure}_worst_tenth": float(worst[: -(-len(worst) // 10)].mean()),
    }
