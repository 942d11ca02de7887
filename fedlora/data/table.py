"""Data before they reach a model: texts with their labels, answers and owners, and the rows of each client."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.config.data_section import column_names


class Turn(NamedTuple):
    """A message of a conversation.

    Attributes:
        role: Who speaks: ``system``, ``user``, ``assistant``, or another that the chat template knows.
        content: What is said.
        learned: Whether the model learns to say it.
    """

    role: str
    content: str
    learned: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        texts: What the model reads, one a row: a text to classify, or a prompt.
        labels: The class of each row, or for a language model the category by which it is assigned to a client; empty
            where rows have no such thing, or several.
        answers: What a language model is to write after each prompt; empty for classification.
        owners: Whose each row is, by ``data.partition-column``; empty where that is not set.
        seconds: The second text of each row, of sentence pairs; empty otherwise.
        numbers: What is to be predicted of each row where it is no class: a number, or 1 for each label that the row
            has and 0 for the others; empty otherwise.
        chats: Each row's conversation, of which ``texts`` and ``answers`` hold the first message and the last; empty
            where rows are prompts and answers.
    """

    texts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    seconds: tuple[str, ...] = ()
    numbers: tuple[tuple[float, ...], ...] = ()
    chats: tuple[tuple[Turn, ...], ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.texts)

    def first(self, count: int | None) -> Table:
        """Return the first rows; all of them for None."""
        return self if count is None or count >= len(self) else self.take(np.arange(count))

    def take(self, rows: NDArray[np.int64]) -> Table:
        """Return the given rows, in that order."""
        return Table(*(tuple(column[row] for row in rows) if column else () for column in self._columns()))

    def _columns(self) -> tuple[tuple[Any, ...], ...]:
        return tuple(getattr(self, item.name) for item in fields(self))


@dataclass(frozen=True)
class Corpus:
    """What clients train on, what the server measures on, and the names of the classes.

    Attributes:
        train: What clients share among themselves.
        test: What the server evaluates on; no client trains on it.
        classes: Class names by class number; of a regression, one name for its number.
        dev: What the server evaluates on while test rows wait for the end; empty without ``data.dev-share``.
        shape: How the columns were read, in words, where that is not what their keys say alone; else empty.
        public: The rows of ``data.public-path``, which are no client's.
    """

    train: Table
    test: Table
    classes: tuple[str, ...]
    dev: Table = field(default_factory=Table)
    shape: str = ""
    public: Table = field(default_factory=Table)

    @property
    def splits(self) -> dict[str, Table]:
        """The tables that are not empty, by name."""
        return {name: table for name in ("train", "dev", "test", "public") if len(table := getattr(self, name))}

    def text_names(self, wanted: str) -> tuple[str, ...]:
        """Return the columns that ``data.text-column`` names, by what was read: one may have commas in its name."""
        read = next((table for table in (self.train, self.test) if len(table)), None)
        return (wanted,) if read is not None and not read.seconds else column_names(wanted)

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

    @property
    def categories(self) -> tuple[str, ...]:
        """What rows are counted by: the classes, or nothing where a row has no one class."""
        return ("rows",) if self._uncounted else self.corpus.classes

    @property
    def _uncounted(self) -> bool:
        return len(self.corpus.train) > 0 and not self.corpus.train.labels

    def label_counts(self) -> NDArray[np.int64]:
        """Return the number of rows of each category at each client, [clients, categories]."""
        if self._uncounted:
            return np.array([[len(rows)] for rows in self.clients], dtype=np.int64)
        labels = np.asarray(self.corpus.train.labels, dtype=np.int64)
        return np.stack([np.bincount(labels[rows], minlength=len(self.corpus.classes)) for rows in self.clients])
