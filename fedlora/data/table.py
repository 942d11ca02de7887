"""What data are before they reach a model: texts with labels, dealt to clients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Table:
    """Labelled texts.

    Attributes:
        texts: One text a row.
        labels: The class number of each row.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def take(self, rows: NDArray[np.int64]) -> Table:
        """Return the given rows, in that order."""
        return Table(tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows))


@dataclass(frozen=True)
class Corpus:
    """A training table, a test table, and the names of the classes.

    Attributes:
        train: What clients share among themselves.
        test: What the server evaluates on; no client trains on it.
        classes: Class names by class number.
    """

    train: Table
    test: Table
    classes: tuple[str, ...]

    def majority_share(self) -> float:
        """Return the test accuracy of always answering the commonest training class."""
        commonest = int(np.bincount(self.train.labels).argmax())
        return float(np.mean(np.asarray(self.test.labels) == commonest))


@dataclass(frozen=True)
class FederatedData:
    """A corpus dealt to clients.

    Attributes:
        corpus: The corpus.
        clients: For each client its row numbers in ``corpus.train``, sorted; disjoint, covering every row.
        holdout: For each client the rows among its own that it never trains on and measures its personal
            accuracy with; empty where the run has no private tensors.
    """

    corpus: Corpus
    clients: tuple[NDArray[np.int64], ...]
    holdout: tuple[NDArray[np.int64], ...]

    def training_rows(self, client: int) -> NDArray[np.int64]:
        """Return the rows that a client trains on."""
        return np.setdiff1d(self.clients[client], self.holdout[client], assume_unique=True)

    def label_counts(self) -> NDArray[np.int64]:
        """Return the number of rows of each class at each client, [clients, classes]."""
        labels = np.asarray(self.corpus.train.labels, dtype=np.int64)
        return np.stack([np.bincount(labels[rows], minlength=len(self.corpus.classes)) for rows in self.clients])
