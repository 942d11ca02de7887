"""What a task is: how rows become inputs, what each row's loss is, and what is measured.

The engine knows no text: it asks a task for batches and for one loss a row. A row's loss must not depend on
the other rows of its batch, so that packing and DP-SGD see the same objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.data import Table

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Rows ready for the model.

    Attributes:
        tokens: One int64 array of token numbers a row, without padding.
        targets: What the task predicts from each row, int64 [n] (for classification, class numbers).
    """

    tokens: tuple[NDArray[np.int64], ...]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, [n]."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)


class Task(ABC):
    """A kind of problem."""

    @abstractmethod
    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Turn the table's texts and labels into rows of at most ``max_length`` tokens."""

    @abstractmethod
    def collate(self, examples: Examples, rows: Sequence[int], device: torch.device) -> Batch:
        """Return the given rows as one batch on ``device``, padded on the right to the longest of them."""

    @abstractmethod
    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each row, float [N] with a gradient; one mean a sequence."""

    @abstractmethod
    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return, for each metric, one number a row, [N]; the metric is their mean. ``loss`` is among them."""
