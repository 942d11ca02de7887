"""What measures and exports models for the server: trainers in a simulation, the server's own model in a deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors
from fedlora.roles import Role
from fedlora.tasks import Task


class Evaluator(Protocol):
    """Measures the server's tensors on rows that the server has, and turns them into adapters."""

    def facts(self, tensors: Tensors, split: str, rows: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Return facts of each of these rows of a split under the server's tensors, by name, [rows] each."""

    def export(
        self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, clients: Sequence[int] = ()
    ) -> list[dict[str, bytes]]:
        """Return the files of a PEFT adapter for the server's tensors, or one for each of ``clients``."""


def metrics(evaluator: Evaluator, task: type[Task], tensors: Tensors, split: str, rows: int) -> dict[str, float]:
    """Return the metrics of the server's tensors on all rows of a split."""
    facts = evaluator.facts(tensors, split, range(rows))
    return task.metrics({name: value / rows for name, value in task.sums(facts).items()})
