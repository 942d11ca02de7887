"""Data: built-in, local and of the hub, and their partition among clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedlora.config import Config
from fedlora.data import partition
from fedlora.data.docstrings import load_docstrings
from fedlora.data.table import Corpus, FederatedData, Table, Turn
from fedlora.data.targets import NUMBERED
from fedlora.registry import Registry
from fedlora.seeded import Seeded

CORPORA: Registry[Callable[[Config], Corpus]] = Registry("data.name")
CORPORA.register("docstrings")(load_docstrings)


# Readers take seconds to import, and most processes never read.
@CORPORA.register("file")
def _file(config: Config) -> Corpus:
    from fedlora.data.files import load_file_corpus

    return load_file_corpus(config)


@CORPORA.register("hub")
def _hub(config: Config) -> Corpus:
    from fedlora.data.hub import load_hub_corpus

    return load_hub_corpus(config)


@CORPORA.register("sites")
def _sites(config: Config) -> Corpus:
    from fedlora.data.files import load_server_rows

    return load_server_rows(config)


def load_corpus(config: Config) -> Corpus:
    """Load the corpus that ``data.name`` names, with its dev rows set apart.

    Raises:
        ValueError: The data cannot be read; the message names the key.
    """
    corpus = CORPORA[config.data.name](config)
    if config.task in NUMBERED and len(corpus.train) and not corpus.train.numbers:
        raise ValueError(
            f"task = {config.task!r}: the rows of data.name = {config.data.name!r} have one class each; give a file "
            "or a data set of your own, and name what is to be predicted in data.label-column."
        )
    if config.data.public_path:
        from fedlora.data.files import load_public_rows

        corpus = replace(corpus, public=load_public_rows(config, corpus.classes))
    if not config.eval.test:
        corpus = replace(corpus, test=Table())
    if config.data.dev_share == 0:
        return corpus
    order = Seeded(config.seed).permutation("dev-split", size=len(corpus.train))
    cut = max(1, round(len(order) * config.data.dev_share))
    if cut >= len(order):
        raise ValueError(f"data.dev-share = {config.data.dev_share}: leaves none of {len(order)} rows to train on.")
    return replace(corpus, train=corpus.train.take(np.sort(order[cut:])), dev=corpus.train.take(np.sort(order[:cut])))


def load_federated(config: Config, num_clients: int) -> FederatedData:
    """Load the corpus and partition it among ``num_clients`` clients (0: one for each owner of rows).

    Raises:
        ValueError: The data cannot be read or partitioned; the message names the key.
    """
    return partitioned(load_corpus(config), config, num_clients)


def partitioned(corpus: Corpus, config: Config, num_clients: int) -> FederatedData:
    """Partition a corpus among clients as the configuration says, as :func:`load_federated` does."""
    return partition.partition(corpus, config.data, num_clients=num_clients, seed=config.seed, final=config.eval.test)


__all__ = [
    "CORPORA",
    "Corpus",
    "FederatedData",
    "Table",
    "Turn",
    "load_corpus",
    "load_federated",
    "partitioned",
]
