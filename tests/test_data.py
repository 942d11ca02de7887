"""Data: files of every kind, the built-in text, partitions, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedlora.config import Config, DataConfig
from fedlora.data import docstrings, load_federated
from fedlora.data.docstrings import LIBRARIES, load_docstrings
from fedlora.data.files import load_file_corpus
from fedlora.data.partition import deal
from fedlora.data.table import Corpus, Table

ROWS = [
    ("one fine film", "good"),
    ('a "quoted", odd one', "bad"),
    ("NA", "good"),
    ("null", "bad"),
    ("naïve café", "good"),
] * 4


def write(path: Path, rows: list[tuple[str, Any]] = ROWS, header: bool = True) -> str:
    frame = pd.DataFrame(rows, columns=["review", "verdict"])
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False, header=header)
        case ".tsv":
            lines = (["review\tverdict"] if header else []) + [f"{text}\t{label}" for text, label in rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps({"review": t, "verdict": v}) + "\n" for t, v in rows), encoding="utf-8")
        case ".parquet":
            frame.to_parquet(path)
    return str(path)


def config(path: str, seed: int = 0, **changes: Any) -> Config:
    data = {"name": "file", "path": path, "text_column": "review", "label_column": "verdict", **changes}
    return Config(seed=seed, data=DataConfig(**data))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    """Texts that readers like to reinterpret (NA, null, quotes, accents) come through as they are."""
    path = write(tmp_path / f"train{suffix}")
    corpus = load_file_corpus(config(path, test_path=path, seed=0))
    assert corpus.classes == ("bad", "good")
    assert [
        (text, corpus.classes[label]) for text, label in zip(corpus.train.texts, corpus.train.labels, strict=True)
    ] == ROWS
    assert corpus.test == corpus.train


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_without_header(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"train{suffix}", header=False)
    corpus = load_file_corpus(config(path, test_path=path, header=False, text_column="0", label_column="1", seed=0))
    assert len(corpus.train) == len(ROWS)
    assert corpus.train.texts[2] == "NA"
    flat = {"data.name": "file", "data.path": path, "data.test-path": path, "data.header": False}
    for columns in ({}, {"data.text-column": 0, "data.label-column": 1}):
        assert load_file_corpus(Config.from_flat({**flat, **columns})) == corpus


def test_texts_taken_for_labels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", [(f"text number {n}", f"label {n % 2}") for n in range(60)])
    with pytest.raises(
        ValueError, match=r"different labels in 48 training rows; this is not the column of the classes"
    ):
        load_file_corpus(config(path, text_column="verdict", label_column="review", seed=0))


def test_a_seeded_split_is_a_split(tmp_path: Path) -> None:
    rows = [(f"text number {n}", str(n % 3)) for n in range(50)]
    path = write(tmp_path / "train.csv", rows)
    one, again, other = (load_file_corpus(config(path, seed=seed)) for seed in (1, 1, 2))
    assert one == again
    assert one.test != other.test
    assert len(one.test) == 10
    assert sorted(one.train.texts + one.test.texts) == sorted(text for text, _ in rows)


def test_numbers_as_labels_sort_by_value(tmp_path: Path) -> None:
    for suffix, values in (
        (".csv", [2, 10, 1]),
        (".parquet", [2, 10, 1]),
        (".parquet", [2.0, 10.0, 1.0]),
        (".jsonl", [2, 10, 1]),
    ):
        path = write(tmp_path / f"train{suffix}", [(f"text {n}", values[n % 3]) for n in range(12)])
        assert load_file_corpus(config(path, test_path=path, seed=0)).classes == ("1", "2", "10")


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (ROWS, {"text_column": "reviews"}, r"data.text-column = 'reviews': no such column .* Did you mean 'review'"),
        (ROWS, {"label_column": "label"}, r"data.label-column = 'label': no such column .* review, verdict"),
        ([("a b", "x"), ("", "y"), (" ", "x")], {}, r"2 rows have no text \(column 'review'\), the first is row 1"),
        ([("a b", "x"), ("c d", "x")] * 3, {}, r"all \d+ training rows have the one label x"),
        (
            [("a b", "x"), ("c d", ""), ("e f", "y")],
            {},
            r"1 rows have no label \(column 'verdict'\), the first is row 1",
        ),
        ([], {}, r"there are no rows"),
    ],
)
def test_bad_files_are_refused(rows: Any, changes: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", rows)
    with pytest.raises(ValueError, match=message):
        load_file_corpus(config(path, **changes, seed=0))


def test_rows_with_more_fields_than_the_header(tmp_path: Path) -> None:
    """pandas would take the first field for an index and read the wrong columns."""
    path = tmp_path / "train.csv"
    path.write_text("review,verdict\nhello, world,pos\ngood, film,neg\n")
    with pytest.raises(ValueError, match="more fields than its header names columns"):
        load_file_corpus(config(str(path), seed=0))
    path.write_text("review,verdict\nhello,pos\ngood, film,neg\n")
    with pytest.raises(ValueError, match="cannot be read as csv"):
        load_file_corpus(config(str(path), seed=0))


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path = 'no.csv': no such file \(/"):
        load_file_corpus(config("no.csv", seed=0))
    corrupt = tmp_path / "bad.parquet"
    corrupt.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load_file_corpus(config(str(corrupt), seed=0))
    other = tmp_path / "data.xlsx"
    other.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"must end in .csv, .tsv, .jsonl or .parquet"):
        load_file_corpus(config(str(other), seed=0))
    binary = tmp_path / "data.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01,\x80")
    with pytest.raises(ValueError, match="cannot be read as csv"):
        load_file_corpus(config(str(binary), seed=0))


def test_a_label_that_training_never_saw(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv")
    test = write(tmp_path / "test.csv", [("text of a kind", "ugly")])
    with pytest.raises(ValueError, match=r"data.test-path: the label 'ugly' .* not among the 2 training labels"):
        load_file_corpus(config(path, test_path=test, seed=0))


# -- the built-in text --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_docstrings(Config())


def test_docstrings_are_balanced_and_apart(corpus: Corpus) -> None:
    assert corpus.classes == tuple(LIBRARIES)
    assert np.bincount(corpus.train.labels).tolist() == [200] * 8
    assert np.bincount(corpus.test.labels).tolist() == [100] * 8
    assert len(set(corpus.train.texts + corpus.test.texts)) == 2400
    assert corpus.majority_share(corpus.test) == 0.125


def test_docstrings_do_not_name_their_library(corpus: Corpus) -> None:
    for table in (corpus.train, corpus.test):
        for text, label in zip(table.texts, table.labels, strict=True):
            assert not re.search(rf"\b(?:{LIBRARIES[corpus.classes[label]][1]})\b", text, re.IGNORECASE), text
            name = corpus.classes[label]
            assert name == "ray" or name not in text.lower(), text


def test_harvesting_is_deterministic(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files again, not from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_docstrings(Config()) == corpus
    assert len(list((tmp_path / "fedlora").iterdir())) == 1
    assert load_docstrings(Config()) == corpus


def test_a_missing_library_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(docstrings.LIBRARIES, "nosuch", ("no-such-distribution", "nosuch"))
    with pytest.raises(ValueError, match=r"no-such-distribution, which is not installed. Install it with: pip install"):
        docstrings.versions()


# -- partitions ---------------------------------------------------------------------------------------


def some_corpus(rows: int = 300) -> Corpus:
    labels = tuple(int(n % 3) for n in range(rows))
    table = Table(tuple(f"text {n}" for n in range(rows)), labels)
    return Corpus(table, table.take(np.arange(5)), ("a", "b", "c"))


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_every_row_goes_to_one_client(partition: str) -> None:
    data = deal(some_corpus(), DataConfig(partition=partition), num_clients=7, seed=0)
    assert np.array_equal(np.sort(np.concatenate(data.clients)), np.arange(300))
    assert data.label_counts().sum() == 300
    again = deal(some_corpus(), DataConfig(partition=partition), num_clients=7, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(data.clients, again.clients, strict=True))


def test_iid_is_iid_even_where_the_file_is_sorted_by_label() -> None:
    """Flower's IidPartitioner cuts contiguous runs: unshuffled, each client would have one class."""
    table = some_corpus().train
    by_label = table.take(np.argsort(table.labels, kind="stable"))
    corpus = Corpus(by_label, by_label.take(np.arange(5)), ("a", "b", "c"))
    counts = deal(corpus, DataConfig(partition="iid"), num_clients=3, seed=0).label_counts()
    assert counts.min() > 20


def test_alpha_and_seed_matter() -> None:
    def spread(alpha: float, seed: int = 0) -> float:
        data = deal(some_corpus(), DataConfig(alpha=alpha), num_clients=5, seed=seed)
        counts = data.label_counts()
        return float((counts / counts.sum(1, keepdims=True)).std(0).mean())

    assert spread(0.1) > 2 * spread(100.0)
    assert spread(1.0, seed=0) != spread(1.0, seed=1)


def test_own_holdout_is_never_trained_on() -> None:
    data = deal(some_corpus(), DataConfig(holdout=0.2), num_clients=5, seed=0)
    for client in range(5):
        rows, held = data.training_rows(client), data.holdout[client]
        assert len(held) >= 1
        assert len(rows) >= 1
        assert not set(rows) & set(held)
        assert sorted([*rows, *held]) == data.clients[client].tolist()
        assert len(held) == max(1, round(len(data.clients[client]) / 5))


def test_too_many_clients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"federation.num-clients = 301: 300 training rows cannot give each client 1"):
        deal(some_corpus(), DataConfig(), num_clients=301, seed=0)
    with pytest.raises(ValueError, match=r"data.partition = 'dirichlet' finds no way .* data.alpha = 0.01: raise it"):
        deal(some_corpus(12), DataConfig(alpha=0.01), num_clients=10, seed=0)


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
    data = load_federated(Config.from_flat(flat), 3)
    assert len(data.clients) == 3
    assert all(len(held) for held in data.holdout)
