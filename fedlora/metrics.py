"""Typed metrics: what a column of ``metrics.jsonl`` or ``result.json`` was measured on, and whether epsilon covers it.

A column's name is all that a file holds. :meth:`Metric.parse` turns it back into what it stands for, and
:func:`is_covered` answers the one question that must never be guessed: a column that nobody has declared here is
outside the differential-privacy guarantee until somebody does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import final

from fedlora.tasks import TASKS

OUTSIDE = "outside the guarantee"
_RANK = re.compile(r"_rank_[1-9][0-9]*$")  # of the model cut to so many ranks
WORST_TENTH = "_worst_tenth"  # of clients: the mean over the tenth of them that does worst


@final
class Population(Enum):
    """The rows, or the clients, that a number describes.

    Attributes:
        prefix: What the names of its columns begin with.
        covered: Whether a run's DP guarantee covers such a number: it is computed from what clients released under
            noise, and from public rows.
    """

    TEST = ("test", True)
    """Test rows, under the server's model."""
    DEV = ("dev", True)
    """Dev rows, which no client trains on, under the server's model."""
    BEFORE = ("before", True)
    """Test or dev rows, under the model before the first round."""
    PERSONAL = ("personal", False)
    """Rows that clients hold out, each under its own model; a mean over the rows, by round."""
    CLIENTS = ("clients", False)
    """Rows that clients hold out, each under the model that it ends with; a statistic over the clients."""
    ALONE_CLIENTS = ("alone_clients", False)
    """As ``CLIENTS``, for clients that train alone."""
    ALONE_TEST = ("alone_test", False)
    """Test rows, under the models of clients that train alone; a statistic over the clients."""
    ALONE_DEV = ("alone_dev", False)
    """Dev rows, under the models of clients that train alone; a statistic over the clients."""
    CENTRAL_TEST = ("central_test", False)
    """Test rows, under a model trained on all clients' rows in one place, without noise."""
    CENTRAL_DEV = ("central_dev", False)
    """Dev rows, under a model trained on all clients' rows in one place, without noise."""
    TRAINING = ("", False)
    """Clients' training rows themselves."""
    SERVER = ("", True)
    """No rows: what follows from the configuration, the schedule, and the tensors that the server holds."""

    def __init__(self, prefix: str, covered: bool) -> None:
        self.prefix = prefix
        self.covered = covered

    @property
    def label(self) -> str:
        """The words for it in a table, such as ``test``."""
        return self.prefix.replace("_", " ")


_OVER_CLIENTS = (Population.CLIENTS, Population.ALONE_CLIENTS, Population.ALONE_TEST, Population.ALONE_DEV)
_TRAINING = ("train_loss", "majority_share")
_PERSONAL = ("clients",)  # how many of them were measured
GENERATED = ("generated_exact_match", "generated_rouge_l", "generated_rows")  # of what a model really writes
TRAFFIC = ("bytes_up", "bytes_down", "bytes_down_cached")  # of a round, the payload alone
_SERVER = (
    *("round", "rounds", "head", "trained_parameters", "clients_ok", "clients_refused"),
    *("guarantee", "epsilon", "epsilon_least", "delta", "noise_multiplier"),
    *("sparsity", "effective_rank", "effective_rank_least", "effective_rank_most", "zero_components"),
    *(*TRAFFIC, "message_bytes_up", "message_bytes_down"),
    *("rounds_to_target", *(f"{name}_to_target" for name in TRAFFIC)),
)


@final
@dataclass(frozen=True)
class Metric:
    """A number that a run reports.

    Attributes:
        name: What is measured, such as ``accuracy``.
        population: What it is measured on.
    """

    name: str
    population: Population

    @property
    def key(self) -> str:
        """The name of its column, such as ``test_accuracy``."""
        return f"{self.population.prefix}_{self.name}" if self.population.prefix else self.name

    @property
    def covered(self) -> bool:
        """Whether a run's DP guarantee covers it."""
        return self.population.covered

    @property
    def label(self) -> str:
        """The words for it in a table, such as ``test accuracy``."""
        return self.key.replace("_", " ")

    @property
    def worst_tenth(self) -> Metric:
        """The mean over the tenth of the clients for which it is worst."""
        assert self.population in _OVER_CLIENTS, f"{self.key} is not a statistic over clients"
        return Metric(f"{self.name}{WORST_TENTH}", self.population)

    @classmethod
    def parse(cls, key: str) -> Metric:
        """Return what a column stands for.

        Raises:
            ValueError: No such column is declared.
        """
        whole, rank = _RANK.sub("", key), _RANK.search(key)
        for metric in declared():
            if metric.key == whole:
                return Metric(f"{metric.name}{rank[0]}", metric.population) if rank else metric
        raise ValueError(
            f"the column {key!r} is not declared in fedlora/metrics.py: what it was measured on is unknown."
        )


def declared() -> Iterator[Metric]:
    """Yield every metric that a run may report, under the registered tasks."""
    yield from (Metric(name, Population.SERVER) for name in _SERVER)
    yield from (Metric(name, Population.TRAINING) for name in _TRAINING)
    yield from (Metric(name, Population.PERSONAL) for name in _PERSONAL)
    for population in (Population.TEST, Population.DEV, Population.PERSONAL):
        yield from (Metric(name, population) for name in GENERATED)
    for name in dict.fromkeys(name for task in TASKS for name in TASKS[task].metric_names):
        for population in Population:
            if not population.prefix:
                continue
            metric = Metric(name, population)
            yield metric
            if population in _OVER_CLIENTS:
                yield metric.worst_tenth


def is_covered(key: str) -> bool:
    """Return whether a run's DP guarantee covers a column; False for one that is not declared."""
    try:
        return Metric.parse(key).covered
    except ValueError:
        return False
