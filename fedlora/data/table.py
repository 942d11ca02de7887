"""Data before they reach a model: texts with their labels, answers and owners, and the rows of each client."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        texts: What the model reads, one a row: a text to classify, or a prompt.
        labels: The class of each row, or for a language model the category by which it is assigned to a client.
        answers: What a language model is to write after each prompt; empty for classification.
        owners: Whose each row is, by ``data.partition-column``; empty where that is not set.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def first(self, count: int | None) -> Table:
        """Return the first rows; all of them for None."""
        return self if count is None or count >= len(self) else self.take(np.arange(count))

    def take(self, rows: NDArray[np.int64]) -> Table:
        """Return the given rows, in that order."""
        return Table(*(tuple(column[row] for row in rows) if column else () for column in self._columns()))

    def _columns(self) -> tuple[tuple[str, ...] | tuple[int, ...], ...]:
        return (self.texts, self.labels, self.answers, self.owners)


@dataclass(frozen=True)
class Corpus:
    """What clients train on, what the server measures on, and the names of the classes.

    Attributes:
        train: What clients share among themselves.
        test: What the server evaluates on; no client trains on it.
        classes: Class names by class number.
        dev: What the server evaluates on while test rows wait for the end; empty without ``data.dev-share``.
    """

    train: Table
    test: Table
    classes: tuple[str, ...]
    dev: Table = field(default_factory=Table)

    @property
    def splits(self) -> dict[str, Table]:
        """The tables that are not empty, by name."""
        return {name: table for name in ("train", "dev", "test") if len(table := getattr(self, name))}

    def majority_share(self, measured: Table) -> float:
        """Return the accuracy on ``measured`` of always answering the commonest training class."""
        commonest = int(np.bincount(self.train.labels).argmax())
        return float(np.mean(np.asarray(measured.labels) == commonest))


@dataclass(frozen=True)
class FederatedData:
    """A corpus partitioned among clients.

    Attributes:
        corpus: The corpus.
        clients: For each client its row numbers in ``corpus.train``, sorted; disjoint, and covering every row but
            those that a search for hyper-parameters must not see.
        holdout: For each client the rows among its own that it never trains on and is measured with; empty
            without ``data.holdout``.
        names: Whose rows each client holds, with the natural partition; otherwise empty.
    """

    corpus: Corpus
    clients: tuple[NDArray[np.int64], ...]
    holdout: tuple[NDArray[np.int64], ...]
    names: tuple[str, ...] = ()

    def training_rows(self, client: int) -> NDArray[np.int64]:
        """Return the rows that a client trains on."""
        return np.setdiff1d(self.clients[client], self.holdout[client], assume_unique=True)

    def label_counts(self) -> NDArray[np.int64]:
        """Return the number of rows of each class at each client, [clients, classes]."""
        labels = np.asarray(self.corpus.train.labels, dtype=np.int64)
        return np.stack([np.bincount(labels[rows], minlength=len(self.corpus.classes)) for rows in self.clients])
