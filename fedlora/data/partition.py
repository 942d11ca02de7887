"""Dealing the training rows to clients, by flwr-datasets' partitioners."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, Partitioner
from numpy.typing import NDArray

from fedlora.config import DataConfig
from fedlora.data.table import Corpus, FederatedData
from fedlora.seeded import Seeded

_HOLDOUT_SHARE = 0.2


def deal(corpus: Corpus, config: DataConfig, *, num_clients: int, seed: int, personal: bool) -> FederatedData:
    """Deal the training rows to ``num_clients`` clients.

    Args:
        corpus: The corpus.
        config: ``data.partition`` and ``data.alpha``.
        num_clients: Number of clients.
        seed: Seed of the partition.
        personal: Whether clients hold out a fifth of their rows, to measure private tensors with.

    Raises:
        ValueError: There are not enough rows for so many clients, or the partitioner found no partition in
            which every client has enough.
    """
    fewest = 2 if personal else 1
    if len(corpus.train) < num_clients * fewest:
        raise ValueError(
            f"federation.num-clients = {num_clients}: {len(corpus.train)} training rows cannot give each client "
            f"{fewest} or more; lower it or add data."
        )
    # Partitioners cut what they are given in its order, and files are often sorted by label.
    order = Seeded(seed).permutation("partition", size=len(corpus.train))
    dataset = Dataset.from_dict({"row": order, "label": [corpus.train.labels[row] for row in order]})
    partitioner = _partitioner(config, num_clients, seed, fewest)
    partitioner.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a partition that is drawn again; the last word is ours
        try:
            clients = tuple(
                np.sort(np.asarray(partitioner.load_partition(client)["row"], dtype=np.int64))
                for client in range(num_clients)
            )
        except ValueError as error:
            raise ValueError(
                f"data.partition = {config.partition!r} with data.alpha = {config.alpha} leaves a client with fewer "
                f"than {fewest} of {len(corpus.train)} rows: raise data.alpha, or lower "
                f"federation.num-clients = {num_clients}."
            ) from error
    covered = np.sort(np.concatenate(clients))
    assert np.array_equal(covered, np.arange(len(corpus.train))), "the partitioner lost or doubled rows"
    holdout = tuple(
        _holdout(rows, client, seed) if personal else np.zeros(0, dtype=np.int64) for client, rows in enumerate(clients)
    )
    logging.getLogger(__name__).debug("dealt %d rows to %d clients", len(covered), num_clients)
    return FederatedData(corpus, clients, holdout)


def _partitioner(config: DataConfig, num_clients: int, seed: int, fewest: int) -> Partitioner:
    if config.partition == "iid":
        return IidPartitioner(num_partitions=num_clients)
    return DirichletPartitioner(
        num_partitions=num_clients,
        partition_by="label",
        alpha=config.alpha,
        min_partition_size=fewest,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )


def _holdout(rows: NDArray[np.int64], client: int, seed: int) -> NDArray[np.int64]:
    size = min(len(rows) - 1, max(1, round(len(rows) * _HOLDOUT_SHARE)))
    order = Seeded(seed).permutation("holdout", client, size=len(rows))
    return np.sort(rows[order[:size]])
