"""The section of the configuration that says what the data are, and how they are partitioned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from fedlora.config.data_keys import corpus_of, read_names
from fedlora.config.fields import ConfigError, at_least, dotted, numbered, one_of, positive, require, share


def column_names(value: str) -> tuple[str, ...]:
    """Return the names in a key that names a column, or several with commas between."""
    return tuple(name.strip() for name in value.split(","))


@final
@dataclass(frozen=True)
class DataConfig:
    """The data and how they are partitioned among clients."""

    name: str = "auto"
    """The data set: ``docstrings`` is built in, ``file`` reads a file, ``hub`` a data set of the Hugging Face hub;
    ``auto``: what ``data.path`` is, or without one ``docstrings``. With ``sites`` the training rows are at deployed
    sites, and this machine never sees them."""
    path: str = ""
    """The training file (csv, tsv, json, jsonl, parquet), or with ``hub`` the data set's name or local folder, as the
    hub keeps it or as ``save_to_disk`` has written it."""
    test_path: str = ""
    """Test file of the same kind; empty: a fifth of the training file, drawn from the seed. With ``sites`` the server's
    own; empty: the server has none."""
    public_path: str = ""
    """File of rows that are public, of the same columns: what ``method.init = 'gradient'`` and ``'lora-ga'`` read, and
    nothing else. No client holds them, and no epsilon covers them."""
    subset: str = ""
    """Configuration of the hub data set, where it has several."""
    train_split: str = "train"
    """Split of the hub data set that clients share among themselves."""
    test_split: str = ""
    """Split of the hub data set that the server tests on; empty: a fifth of the training split."""
    text_column: str = numbered("text")
    """Name of the text (or prompt) column; where the file has no header its number, from 0 (``text`` stands for 0). Two
    names with a comma between, such as ``premise,hypothesis``: sentence pairs, by the tokenizer's own pair encoding."""
    label_column: str = numbered("label")
    """Name of the label column; where the file has no header its number, from 0 (``label`` stands for 1). For
    ``regression`` a column of numbers; for ``multi-label`` a column of lists, or of names with
    ``multi-label.separator`` between, or several columns of 0 and 1, such as ``toxic,insult``. For ``causal-lm`` a
    category to partition by, read by ``dirichlet`` and ``shards`` only."""
    classes: str = ""
    """Names of the classes, with commas between, in the order of their numbers; one with a comma in double quotes, as
    in csv: ``'"yes, please",no'``. Empty: the labels that the training rows have, sorted. Under DP name them: that a
    label occurs at all is not protected otherwise."""
    answer_column: str = "answer"
    """Name of the column that the model learns to write, for ``causal-lm``."""
    prompt_template: str = ""
    """Prompt with columns in braces, such as ``{question} Answer:``, for ``causal-lm``; empty: the text column."""
    chat_template: bool = False
    """Whether the prompt is a user's message and the answer the assistant's, by the tokenizer's chat template. A
    column of messages (OpenAI's ``messages``, ShareGPT's ``conversations``) always goes through it."""
    learn: str = "last"
    """Which of the assistant's turns in a conversation are learned: the ``last``, or ``all``; for ``causal-lm``."""
    header: bool = True
    """Whether the first line of a csv or tsv names the columns."""
    partition: str = "dirichlet"
    """``iid``; ``dirichlet``: label shares drawn from Dirichlet(alpha); ``shards``: a few shards of rows sorted by
    label; ``quantity``: sizes drawn from Dirichlet(alpha); ``natural``: by partition-column."""
    alpha: float = 0.5
    """Concentration of the Dirichlet and quantity partitions; smaller is more uneven."""
    shards_per_client: int = 2
    """Shards that each client gets, with ``shards``."""
    partition_column: str = ""
    """Column that says whose a row is (a hospital, a user); ``natural`` goes by it, and no other partition may
    put rows of one owner on two clients."""
    min_size: int = 1
    """Rows that each client must have to train on; a partition that gives one fewer is refused."""
    holdout: float = 0.0
    """Share of its rows that each client holds out to be measured on; 0: none, or a fifth where a run needs it
    (personal tensors, ``eval.baselines``)."""
    dev_share: float = 0.0
    """Share of the training rows that nobody trains on and the curve is measured on; the test rows are then
    read once, after the last round. 0: none, and the curve is measured on the test rows."""

    def __post_init__(self) -> None:
        """Check the fields, and put what it stands for in the place of ``name = 'auto'``."""
        if self.name == "auto":
            object.__setattr__(self, "name", corpus_of(self.path))
        one_of("data.partition", self.partition, ("iid", "dirichlet", "shards", "quantity", "natural"))
        one_of("data.learn", self.learn, ("last", "all"))
        positive("data.alpha", self.alpha)
        at_least("data.shards-per-client", self.shards_per_client, 1)
        at_least("data.min-size", self.min_size, 1)
        share("data.holdout", self.holdout)
        share("data.dev-share", self.dev_share)
        require(
            self.partition != "natural" or self.partition_column != "",
            "data.partition-column",
            self.partition_column,
            "must name the column that says whose a row is, with data.partition = 'natural'.",
        )
        if self.name in ("file", "hub"):
            what = "a file" if self.name == "file" else "a data set of the hub or a local folder of one"
            require(self.path != "", "data.path", self.path, f"must name {what} with data.name = {self.name!r}.")
        readers = {
            "path": ("file", "hub"),
            "test_path": ("file", "sites"),
            "subset": ("hub",),
            "test_split": ("hub",),
            "classes": ("file", "hub", "sites"),
        }
        for name, own in readers.items():
            require(
                self.name in own or getattr(self, name) == "",
                dotted("data", name),
                getattr(self, name),
                f"is only read with data.name = {' or '.join(map(repr, own))}, not {self.name!r}.",
            )
        if self.classes:
            rule = "must be two names or more, each once, with commas between"
            try:
                names = self.class_names
            except ValueError as error:
                raise ConfigError(
                    f"data.classes = {self.classes!r}: {rule}, and those with a comma in double quotes ({error})."
                ) from error
            valid = len(names) > 1 and all(names) and len(set(names)) == len(names)
            require(valid, "data.classes", self.classes, f"{rule}.")
        if not self.header:
            for name, value in (("text", self.text_column), ("label", self.label_column)):
                require(
                    all(part.isdecimal() or part == name for part in column_names(value)),
                    f"data.{name}-column",
                    value,
                    "must be a column number from 0 with data.header = false.",
                )
        for name, value in (("text", self.text_column), ("label", self.label_column)):
            names = column_names(value)
            require(
                all(names) and len(set(names)) == len(names),
                f"data.{name}-column",
                value,
                "must name a column, or several, each once, with commas between.",
            )
        require(
            not set(column_names(self.text_column)) & set(column_names(self.label_column)),
            "data.label-column",
            self.label_column,
            "is the text column; name the column that holds the labels.",
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``classes``."""
        return read_names(self.classes)
