"""Data: built-in and local, and their partition among clients."""

from __future__ import annotations

from collections.abc import Callable

from fedlora.config import Config, DataConfig
from fedlora.data.docstrings import load_docstrings
from fedlora.data.files import load_file_corpus
from fedlora.data.table import Corpus, FederatedData, Table
from fedlora.registry import Registry

CORPORA: Registry[Callable[[DataConfig, int], Corpus]] = Registry("data.name")


@CORPORA.register("docstrings")
def _docstrings(_config: DataConfig, _seed: int) -> Corpus:
    return load_docstrings()


CORPORA.register("file")(load_file_corpus)


def load_federated(config: Config, num_clients: int) -> FederatedData:
    """Load the corpus that ``data.name`` names and deal it to ``num_clients`` clients.

    Raises:
        ValueError: The data cannot be read or dealt; the message names the key.
    """
    from fedlora.data.partition import deal  # takes seconds to import; configuration errors should not wait

    corpus = CORPORA[config.data.name](config.data, config.seed)
    personal = config.method.head == "private"
    return deal(corpus, config.data, num_clients=num_clients, seed=config.seed, personal=personal)


__all__ = ["CORPORA", "Corpus", "FederatedData", "Table", "load_federated"]
