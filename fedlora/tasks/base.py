"""What a task is: how rows become inputs, what each row's loss is, and what is measured.

The engine knows no text: it asks a task for batches and for one loss a row. A row's loss must not depend on
the other rows of its batch, so that packing and DP-SGD see the same objective.

Servers and command lines ask a task for its names and metrics only: torch is imported where it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.data import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = dict[str, "Tensor"]


@dataclass(frozen=True)
class Examples:
    """Rows ready for the model.

    Attributes:
        tokens: One int64 array of token numbers a row, without padding.
        targets: What the task predicts from each row, int64 [n]: a class, or where the answer begins.
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


@dataclass(frozen=True)
class Measure:
    """The number by which runs of a task are compared.

    Attributes:
        name: Its name among the task's metrics.
        higher_is_better: Which way it improves.
    """

    name: str
    higher_is_better: bool


class Task(ABC):
    """A kind of problem.

    Args:
        pad_token_id: The token that fills short rows up.
        chat_template: Whether prompts go through the tokenizer's chat template.
    """

    auto_model: ClassVar[str]
    """The class of transformers that loads a model for it."""
    peft_type: ClassVar[str]
    """Its name in PEFT."""
    has_head: ClassVar[bool]
    """Whether it puts a head of its own on the base model; without, it predicts each token."""
    measure: ClassVar[Measure]
    """What runs are compared by."""
    metric_names: ClassVar[tuple[str, ...]]
    """What :meth:`metrics` returns."""

    def __init__(self, pad_token_id: int, chat_template: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template

    @classmethod
    def build(cls, tokenizer: Any, config: Config) -> Self:
        """Return the task for a model's tokenizer; its own keys are ``config.options(...)``."""
        return cls(tokenizer.pad_token_id, config.data.chat_template)

    @abstractmethod
    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Turn the table's rows into rows of at most ``max_length`` tokens."""

    @abstractmethod
    def collate(self, examples: Examples, rows: Sequence[int], device: torch.device) -> Batch:
        """Return the given rows as one batch on ``device``, padded on the right to the longest of them."""

    @abstractmethod
    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each row, float [N] with a gradient; one mean a sequence."""

    @abstractmethod
    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return facts of each row, [N] each; ``loss`` is among them."""

    @staticmethod
    @abstractmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of some rows, given the means of their facts; ``loss`` and the measure are among them."""

    def padded(self, examples: Examples, rows: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return token numbers and attention mask of the rows, [N, T] each."""
        longest = max(len(examples.tokens[row]) for row in rows)
        ids = np.full((len(rows), longest), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(rows):
            tokens = examples.tokens[row]
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
        return ids, mask


def wide_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits for a batch, in float32 or wider."""
    import torch

    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def to_device(arrays: Mapping[str, NDArray[np.int64]], device: torch.device) -> Batch:
    """Return arrays as tensors on ``device``."""
    import torch

    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
