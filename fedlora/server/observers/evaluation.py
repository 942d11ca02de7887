"""Measuring a round: the server's tensors on rows that the server has, and clients' own models on theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from fedlora.server.evaluator import Evaluator, metrics
from fedlora.server.observers.base import Observer, RoundEnd
from fedlora.server.personal import Sums, personal_means
from fedlora.state import ServerState
from fedlora.tasks import Task


@final
class ServerEvaluation(Observer):
    """Evaluates the server's tensors on the rows that a round is measured on.

    Args:
        evaluator: Measures.
        task: The task.
        split: The split that a round is measured on.
        rows: How many rows it has.
    """

    def __init__(self, evaluator: Evaluator, task: type[Task], split: str, rows: int) -> None:
        self.evaluator, self.task, self.split, self.rows = evaluator, task, split, rows

    def measure(self, state: ServerState) -> dict[str, float]:
        """Return the metrics of a state, without the name of the split."""
        return metrics(self.evaluator, self.task, state.tensors, self.split, self.rows)

    def on_round(self, end: RoundEnd) -> None:
        """Fill in the round's metrics."""
        end.measured = {f"{self.split}_{name}": value for name, value in self.measure(end.state).items()}


@final
class PersonalMetrics(Observer):
    """Turns the sums that clients reported of their own rows into metrics.

    Args:
        task: The task.
        sums: Returns, after a round, each client's sums of its rows' facts; empty where there are none.
    """

    def __init__(self, task: type[Task], sums: Callable[[RoundEnd], Mapping[int, Sums]]) -> None:
        self.task, self.sums = task, sums

    def on_round(self, end: RoundEnd) -> None:
        """Fill in the metrics of the clients' own models."""
        sums = self.sums(end)
        if not sums:
            return
        means: dict[str, Any] = personal_means(sums)
        clients = means.pop("personal_clients")
        facts = {name.removeprefix("personal_"): float(value) for name, value in means.items()}
        own = self.task.metrics(facts)
        end.personal = {**{f"personal_{name}": value for name, value in own.items()}, "personal_clients": clients}
