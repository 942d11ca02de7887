"""What all ways of a table do: the same clients with the same tokens, batches, start tensors and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.engine.shapes import CLASSES, LEAST_TOKEN, Shape
from fedlora.config import TrainConfig
from fedlora.engine import ClientWork
from fedlora.methods import Method, initial_tensors
from fedlora.seeded import Seeded
from fedlora.tasks import Examples

Arrays = Mapping[str, NDArray[np.floating]]


@final
@dataclass(frozen=True)
class Job:
    """A round: clients, steps, rows and tokens, all rows of one length.

    Attributes:
        shape: The model's shape.
        clients: K.
        steps: Optimizer steps of each client.
        rows: Rows of a step's batch.
        tokens: Tokens of a row.
        vocabulary: Of the model.
        repeated: Whether a client takes all of its steps on one batch, so that its loss goes where its steps lead.
        rate: Learning rate.
    """

    shape: Shape
    clients: int
    steps: int
    rows: int
    tokens: int
    vocabulary: int
    repeated: bool = False
    rate: float = 1e-3

    @property
    def train(self) -> TrainConfig:
        """Local training: AdamW without weight decay."""
        return TrainConfig(batch_size=self.rows, local_steps=self.steps, learning_rate=self.rate)

    @cached_property
    def examples(self) -> list[Examples]:
        """Each client's rows, in the order in which it takes them; what client k has does not depend on K."""
        return [self._examples(client) for client in range(self.clients)]

    def _examples(self, client: int) -> Examples:
        generator = np.random.default_rng([7, client])
        count = self.rows * (1 if self.repeated else self.steps)
        ids = generator.integers(LEAST_TOKEN, self.vocabulary, (count, self.tokens))
        if self.shape.causal:
            learned = np.arange(self.tokens) >= 1
            return Examples(tuple(ids), (learned,) * count)
        return Examples(tuple(ids), generator.integers(0, CLASSES, count))

    def batches(self) -> list[NDArray[np.int64]]:
        """Return the row numbers of each step."""
        rows = np.arange(self.rows)
        return [rows + (0 if self.repeated else step * self.rows) for step in range(self.steps)]

    def works(self, starts: list[Arrays]) -> list[ClientWork]:
        """Return what the engine is given; client k starts at ``starts[k % len(starts)]``."""
        batches = self.batches()
        return [
            ClientWork(
                client, self.table, count, [rows + client * count for rows in batches], starts[client % len(starts)]
            )
            for client, count in enumerate(map(len, self.examples))
        ]

    @cached_property
    def table(self) -> Examples:
        """All clients' rows in one table, as a simulation has them."""
        parts = [(rows, row) for rows in self.examples for row in range(len(rows))]
        return self.shape.built_task().join(parts)

    @cached_property
    def _tensors(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def tensors(self, client: int) -> tuple[Tensor, Tensor]:
        """Return a client's token numbers [steps, rows, T] and labels for plain PyTorch, made once, in pinned memory.

        A language model's labels are the next tokens, -100 after the last, so that no logits have to be copied to shift
        them.
        """
        if client not in self._tensors:
            self._tensors[client] = self._made(client)
        return self._tensors[client]

    def _made(self, client: int) -> tuple[Tensor, Tensor]:
        rows = self.examples[client]
        taken = np.stack(self.batches())
        ids = torch.from_numpy(np.stack(rows.tokens)[taken])
        if self.shape.causal:
            labels = torch.cat([ids[..., 1:], torch.full_like(ids[..., :1], -100)], -1)
        else:
            labels = torch.from_numpy(np.asarray(rows.targets)[taken])
        return (ids.pin_memory(), labels.pin_memory()) if torch.cuda.is_available() else (ids, labels)


def start_tensors(method: Method) -> dict[str, NDArray[Any]]:
    """Return the tensors that every client starts a round with."""
    return dict(initial_tensors(method.specs(), Seeded(0), "float32"))
