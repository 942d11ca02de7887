"""What a task is: how rows become inputs, what each row's loss is, and what is measured.

The engine is independent of texts: it asks a task for batches and for one loss a row. A row's loss must not depend on
the other rows of its batch, so that packing and DP-SGD see the same objective.

Servers and command lines ask a task for its names and metrics only: torch is imported where it computes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.data import Table

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = dict[str, "Tensor"]


class Rows(Protocol):
    """Rows ready for the model: all that the engine uses of data."""

    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    def cost(self) -> NDArray[np.int64]:
        """What each row takes of a forward pass that is padded to the longest: its tokens, frames or patches; [n]."""


@final
@dataclass(frozen=True)
class Measure:
    """The number by which runs of a task are compared.

    Attributes:
        name: Its name among the task's metrics.
        higher_is_better: Which way it improves.
        most: The most that it can be.
    """

    name: str
    higher_is_better: bool
    most: float = math.inf


class Task(ABC):
    """A kind of problem. Its rows are of its own type, which nothing else reads."""

    auto_model: ClassVar[str]
    """The class of transformers that loads a model for it."""
    peft_type: ClassVar[str]
    """Its name in PEFT."""
    has_head: ClassVar[bool]
    """Whether it puts a head of its own on the base model; without, it predicts each token."""
    has_classes: ClassVar[bool] = True
    """Of a task with a head: whether its outputs are classes or labels with names, so that ``data.classes`` is read."""
    one_class: ClassVar[bool] = True
    """Whether each row has one class, or a language model's one category, by which rows can be partitioned."""
    problem_type: ClassVar[str] = ""
    """What transformers calls its head's problem, by which it chooses a loss; empty: what the number of outputs
    says."""
    measure: ClassVar[Measure]
    """What runs are compared by."""
    metric_names: ClassVar[tuple[str, ...]]
    """What :meth:`metrics` returns."""

    @classmethod
    @abstractmethod
    def build(cls, tokenizer: Any, config: Config) -> Self:
        """Return the task for a model's tokenizer; its own keys are ``config.options(...)``."""

    @abstractmethod
    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Rows:
        """Turn the table's rows into rows of a cost of at most ``max_length``."""

    @abstractmethod
    def made_up_rows(self, *, long: bool = False) -> Rows:
        """Return a few rows that are nobody's, of several costs, from which all that trains gets a gradient.

        Args:
            long: Whether two different ones as long as rows may be are among them, at the end.
        """

    @abstractmethod
    def join(self, parts: Sequence[tuple[Any, int]]) -> Rows:
        """Return rows from several sources as one: for each its source, as :meth:`encode` made it, and its number."""

    @abstractmethod
    def collate(self, rows: Any, numbers: Sequence[int], device: torch.device) -> Batch:
        """Return some of these rows, by number, as one batch on ``device``, padded to the longest of them."""

    def outputs(self, model_config: Any) -> int:
        """Return how many numbers the model's output has for each unit of a row's cost, where that may be many."""
        return 1

    def with_less_memory(self, model: nn.Module) -> Task | None:
        """Return a task that computes the same in less memory, to be tried on this model; None: there is none."""
        return None

    @abstractmethod
    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each row, float [N] with a gradient; one mean a sequence."""

    @abstractmethod
    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return facts of each row, [N] each; ``loss`` is among them."""

    @staticmethod
    def facts_together(facts: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return facts of rows taken together that no mean over single rows gives, such as a correlation of ranks.

        They count among the means that :meth:`metrics` is given. Where rows are at several clients, that is the mean of
        what each client's rows give, weighted by their number.

        Args:
            facts: Facts of each row, by name, [n] each; there is at least one row.
        """
        return {}

    @classmethod
    def sums(cls, facts: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return the sums of rows' facts, by name, and what they are together, times the number of rows."""
        sums = {name: float(values.sum()) for name, values in facts.items()}
        rows = min((len(values) for values in facts.values()), default=0)
        return sums | ({name: rows * value for name, value in cls.facts_together(facts).items()} if rows else {})

    @staticmethod
    @abstractmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of some rows, ``loss`` and the measure among them.

        Args:
            means: The means of their facts: :meth:`sums` by the number of rows.
        """
