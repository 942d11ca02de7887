"""Partitions: every row at one client, skews, minimum sizes, held-out rows, and owners that are never parted."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner

from fedlora.config import Config, DataConfig
from fedlora.data import load_federated
from fedlora.data.partition import _dirichlet, partition
from fedlora.data.table import Corpus, Table
from fedlora.plugins import read_config
from tests.support.rows import config, write


def some_corpus(rows: int = 300) -> Corpus:
    labels = tuple(int(n % 3) for n in range(rows))
    table = Table(tuple(f"text {n}" for n in range(rows)), labels)
    return Corpus(table, table.take(np.arange(5)), ("a", "b", "c"))


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_every_row_goes_to_one_client(kind: str) -> None:
    data = partition(some_corpus(), DataConfig(partition=kind), num_clients=7, seed=0)
    assert np.array_equal(np.sort(np.concatenate(data.clients)), np.arange(300))
    assert data.label_counts().sum() == 300
    again = partition(some_corpus(), DataConfig(partition=kind), num_clients=7, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(data.clients, again.clients, strict=True))


def test_iid_is_iid_even_where_the_file_is_sorted_by_label() -> None:
    """Flower's IidPartitioner cuts contiguous runs: unshuffled, each client would have one class."""
    table = some_corpus().train
    by_label = table.take(np.argsort(table.labels, kind="stable"))
    corpus = Corpus(by_label, by_label.take(np.arange(5)), ("a", "b", "c"))
    counts = partition(corpus, DataConfig(partition="iid"), num_clients=3, seed=0).label_counts()
    assert counts.min() > 20


def test_alpha_and_seed_matter() -> None:
    def spread(alpha: float, seed: int = 0) -> float:
        data = partition(some_corpus(), DataConfig(alpha=alpha), num_clients=5, seed=seed)
        counts = data.label_counts()
        return float((counts / counts.sum(1, keepdims=True)).std(0).mean())

    assert spread(0.1) > 2 * spread(100.0)
    assert spread(1.0, seed=0) != spread(1.0, seed=1)


@pytest.mark.parametrize(
    ("alpha", "clients", "least", "seed"), [(0.5, 10, 1, 0), (0.3, 6, 8, 5), (0.05, 3, 1, 2), (1, 40, 2, 7)]
)
def test_dirichlet_deals_as_flwr_datasets_does(alpha: float, clients: int, least: int, seed: int) -> None:
    """Its partitioner draws again where a client has too few rows, up to ten times; so does ours, by the same draws."""
    labels = np.random.default_rng(seed).integers(0, 4, size=500)
    theirs = DirichletPartitioner(
        num_partitions=clients,
        partition_by="label",
        alpha=alpha,
        min_partition_size=least,
        self_balancing=False,
        shuffle=False,
        seed=seed,
    )
    theirs.dataset = Dataset.from_dict({"label": labels, "place": np.arange(500)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [theirs.load_partition(client)[:]["place"] for client in range(clients)]
    ours = _dirichlet(labels, DataConfig(alpha=alpha, min_size=least), clients, seed)
    assert [rows.tolist() for rows in ours] == [list(rows) for rows in expected]


def test_own_holdout_is_never_trained_on() -> None:
    data = partition(some_corpus(), DataConfig(holdout=0.2), num_clients=5, seed=0)
    for client in range(5):
        rows, held = data.training_rows(client), data.holdout[client]
        assert len(held) >= 1
        assert len(rows) >= 1
        assert not set(rows) & set(held)
        assert sorted([*rows, *held]) == data.clients[client].tolist()
        assert len(held) == max(1, round(len(data.clients[client]) / 5))


def test_too_many_clients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"federation.num-clients = 301: 300 training rows cannot give each client 1"):
        partition(some_corpus(), DataConfig(), num_clients=301, seed=0)
    with pytest.raises(ValueError, match=r"data.partition = 'dirichlet' finds no way .* data.alpha = 0.01: raise it"):
        partition(some_corpus(12), DataConfig(alpha=0.01), num_clients=10, seed=0)


def test_load_federated_follows_the_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv")
    flat = {
        "data.name": "file",
        "data.path": path,
        "data.text-column": "review",
        "data.label-column": "verdict",
        "data.holdout": 0.2,
        "data.partition": "iid",
    }
    data = load_federated(read_config(flat), 3)
    assert len(data.clients) == 3
    assert all(len(held) for held in data.holdout)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "shards", "quantity"])
def test_a_minimum_of_rows_holds_or_is_refused(kind: str) -> None:
    for least in (1, 10):
        parts = DataConfig(partition=kind, min_size=least, alpha=5.0)
        data = partition(some_corpus(), parts, num_clients=10, seed=3)
        assert min(len(data.training_rows(client)) for client in range(10)) >= least
    with pytest.raises(ValueError, match=r"training rows cannot give each client 31 or more|finds no way"):
        partition(some_corpus(), DataConfig(partition=kind, min_size=31), num_clients=10, seed=3)


def test_shards_give_clients_few_classes() -> None:
    corpus = some_corpus()
    few = partition(corpus, DataConfig(partition="shards", shards_per_client=1), num_clients=6, seed=0).label_counts()
    assert (few > 0).sum(1).max() == 1
    more = partition(corpus, DataConfig(partition="shards", shards_per_client=5), num_clients=6, seed=0).label_counts()
    assert (more > 0).sum(1).mean() > 2


def test_quantity_skews_sizes_and_not_labels() -> None:
    even, uneven = (
        partition(some_corpus(), DataConfig(partition="quantity", alpha=alpha), num_clients=6, seed=0)
        for alpha in (1000.0, 0.3)
    )
    assert np.ptp([len(rows) for rows in even.clients]) < 20 < np.ptp([len(rows) for rows in uneven.clients])
    largest = uneven.label_counts()[np.argmax([len(rows) for rows in uneven.clients])]
    assert largest.max() < 1.4 * largest.min()


# -- whose rows they are ------------------------------------------------------------------------------

HOSPITALS = [(f"text {n}", "good" if n % 3 else "bad", f"h{n % 7}") for n in range(140)]


def owned(path: Path, rows: Any = HOSPITALS, **changes: Any) -> Config:
    frame = pd.DataFrame(rows, columns=["review", "verdict", "hospital"])
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return config(str(path), **{"partition": "natural", "partition_column": "hospital", **changes})


def test_natural_clients_are_owners(tmp_path: Path) -> None:
    """One client an owner; of fewer clients each has whole owners, and all have about the same."""
    path = tmp_path / "train.parquet"
    data = load_federated(owned(path), 0)
    assert data.names == tuple(f"h{n}" for n in range(7))
    for client, rows in enumerate(data.clients):
        assert {data.corpus.train.owners[row] for row in rows} == {f"h{client}"}
    fewer = load_federated(owned(path), 3)
    whose = [{fewer.corpus.train.owners[row] for row in rows} for rows in fewer.clients]
    assert sorted(map(len, whose)) == [2, 2, 3]
    assert not whose[0] & whose[1] | whose[0] & whose[2] | whose[1] & whose[2]
    with pytest.raises(ValueError, match=r"num-clients = 8: data.partition = 'natural' finds 7 owners of rows"):
        load_federated(owned(path), 8)
    small = [("alone", "good", "h9"), *HOSPITALS]
    with pytest.raises(ValueError, match=r"gives 1 of 8 clients fewer .* data.min-size = 5: client 7 \(h9\) has 1"):
        load_federated(owned(path, small, min_size=5, test_path=str(path)), 0)
    with pytest.raises(ValueError, match=r"data.holdout = 0.2: client 7 \(h9\) has 1 row\(s\), too few to train on"):
        load_federated(owned(path, small, holdout=0.2, test_path=str(path)), 0)


def test_rows_of_one_owner_are_never_on_two_clients(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    with pytest.raises(ValueError, match=r"rows of 'h\d' are on clients \d and \d with data.partition = 'iid'; use"):
        load_federated(owned(path, partition="iid"), 3)
    nobody = [*HOSPITALS, ("text", "good", None)]
    with pytest.raises(ValueError, match=r"1 rows have no owner \(column 'hospital'\)"):
        load_federated(owned(path, nobody), 0)
    with pytest.raises(ValueError, match=r"data.partition-column = '': must name the column"):
        DataConfig(partition="natural")


@pytest.mark.parametrize("other", ["H1", " h1", "h1\u00a0", "\uff481", "h\u200b1"])
def test_two_spellings_of_one_owner_are_refused_with_their_lines(other: str, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    rows = [("a", "good", "h1"), ("two\nlines", "bad", "h1"), ("c", "good", "h2"), ("d", "bad", other)]
    said = (
        r"data.partition-column = 'hospital' of data.path = .*: the owners 'h1' \(row 0 \(line 2\), row 1 \(line 3\)\)"
    )
    for partition_by in ("natural", "iid"):
        with pytest.raises(
            ValueError, match=rf"{said} and .* differ in case, spaces .* on two clients; write"
        ) as caught:
            load_federated(owned(path, rows, partition=partition_by), 2)
        assert f"{other!r} (row 3 (line 6))" in str(caught.value)
    load_federated(owned(path, [*rows[:3], ("d", "bad", "h1")], test_path=str(path)), 2)


def test_owners_of_any_corpus_are_checked() -> None:
    table = replace(some_corpus(6).train, owners=("a", "b", "b", "B", "a", "a"))
    config = DataConfig(partition="natural", partition_column="owner")
    with pytest.raises(
        ValueError, match=r"the owners 'b' \(training row 1, training row 2\) and 'B' \(training row 3\)"
    ):
        partition(Corpus(table, table, ("a", "b", "c")), config, num_clients=0, seed=0)
