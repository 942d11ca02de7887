"""Data: files of every kind, the built-in text, partitions, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedlora.config import Config, ConfigError, DataConfig
from fedlora.data import docstrings, load_corpus, load_federated
from fedlora.data.docstrings import LIBRARIES, load_docstrings
from fedlora.data.files import load_file_corpus
from fedlora.data.partition import deal
from fedlora.data.table import Corpus, Table
from fedlora.plugins import read_config

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
        assert load_file_corpus(read_config({**flat, **columns})) == corpus


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


def test_declared_classes_do_not_follow_the_rows(tmp_path: Path) -> None:
    """A label that one row alone has would show in the size of the head, and so that the row is there."""
    path = write(tmp_path / "train.csv", [(f"text {n}", ("bad", "good")[n % 2]) for n in range(12)])
    asked = config(path, test_path=path, classes="good, rare, bad")
    corpus = load_file_corpus(asked)
    assert corpus.classes == ("good", "rare", "bad")
    assert {corpus.classes[label] for label in corpus.train.labels} == {"good", "bad"}
    assert load_federated(asked, 2).label_counts().sum(0).tolist() == [6, 0, 6]
    with pytest.raises(ValueError, match=r"data.classes = 'good,fair': the label 'bad' of .* is none of them"):
        load_file_corpus(config(path, test_path=path, classes="good,fair"))
    for classes in ("good", "good,good", "good,,bad"):
        with pytest.raises(ConfigError, match=r"data.classes = .*: must be two names or more, each once"):
            config(path, classes=classes)


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
    data = load_federated(read_config(flat), 3)
    assert len(data.clients) == 3
    assert all(len(held) for held in data.holdout)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "quantity"])
def test_a_minimum_of_rows_holds_or_is_refused(partition: str) -> None:
    for least in (1, 10):
        parts = DataConfig(partition=partition, min_size=least, alpha=5.0)
        data = deal(some_corpus(), parts, num_clients=10, seed=3)
        assert min(len(data.training_rows(client)) for client in range(10)) >= least
    with pytest.raises(ValueError, match=r"training rows cannot give each client 31 or more|finds no way"):
        deal(some_corpus(), DataConfig(partition=partition, min_size=31), num_clients=10, seed=3)


def test_shards_give_clients_few_classes() -> None:
    corpus = some_corpus()
    few = deal(corpus, DataConfig(partition="shards", shards_per_client=1), num_clients=6, seed=0).label_counts()
    assert (few > 0).sum(1).max() == 1
    more = deal(corpus, DataConfig(partition="shards", shards_per_client=5), num_clients=6, seed=0).label_counts()
    assert (more > 0).sum(1).mean() > 2


def test_quantity_skews_sizes_and_not_labels() -> None:
    even, uneven = (
        deal(some_corpus(), DataConfig(partition="quantity", alpha=alpha), num_clients=6, seed=0)
        for alpha in (1000.0, 0.3)
    )
    assert np.ptp([len(rows) for rows in even.clients]) < 20 < np.ptp([len(rows) for rows in uneven.clients])
    largest = uneven.label_counts()[np.argmax([len(rows) for rows in uneven.clients])]
    assert largest.max() < 1.4 * largest.min()


# -- whose rows they are ------------------------------------------------------------------------------

HOSPITALS = [(f"text {n}", "good" if n % 3 else "bad", f"h{n % 7}") for n in range(140)]


def owned(path: Path, rows: Any = HOSPITALS, **changes: Any) -> Config:
    pd.DataFrame(rows, columns=["review", "verdict", "hospital"]).to_parquet(path)
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
    alike = [*HOSPITALS, ("text", "good", " H1")]
    with pytest.raises(ValueError, match=r"'(h1|H1)' and ' ?(H1|h1)' differ in case or spaces alone"):
        load_federated(owned(path, alike, test_path=str(path)), 0)
    nobody = [*HOSPITALS, ("text", "good", None)]
    with pytest.raises(ValueError, match=r"1 rows have no owner \(column 'hospital'\)"):
        load_federated(owned(path, nobody), 0)
    with pytest.raises(ValueError, match=r"data.partition-column = '': must name the column"):
        DataConfig(partition="natural")


def test_docstrings_have_natural_clients(corpus: Corpus) -> None:
    natural = DataConfig(partition="natural", partition_column="sub-package")
    data = load_federated(Config(data=natural), 0)
    assert len(data.clients) > 50
    assert data.corpus.test == corpus.test.take(np.arange(800)) or data.corpus.test.texts == corpus.test.texts
    for name, rows in zip(data.names, data.clients, strict=True):
        assert {data.corpus.classes[data.corpus.train.labels[row]] for row in rows} == {name.split(".")[0]}
    with pytest.raises(ValueError, match=r"has one such column, sub-package. Did you mean 'sub-package'"):
        load_federated(Config(data=DataConfig(partition="natural", partition_column="subpackage")), 0)


# -- the hub's format ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder as the hub keeps data sets: a card that declares classes, and parquet files by split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "films"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: review\n    dtype: string\n  - name: verdict\n    dtype:\n"
        "      class_label:\n        names:\n          '0': bad\n          '1': good\n"
        "configs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: data/{s}.parquet\n" for s in ("train", "validation", "hidden"))
        + "---\n"
    )
    for split, rows in (("train", 50), ("validation", 10), ("hidden", 4)):
        labels = [-1] * rows if split == "hidden" else [n % 2 for n in range(rows)]
        frame = pd.DataFrame({"review": [f"{split} {n}" for n in range(rows)], "verdict": labels})
        frame.to_parquet(folder / "data" / f"{split}.parquet")
    return folder


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_hub_data_sets(hub: Path) -> None:
    def load(**changes: Any) -> Corpus:
        return load_corpus(config(str(hub), name="hub", **changes))

    corpus = load(test_split="validation")
    assert corpus.classes == ("bad", "good"), "the names that the data set declares, not 0 and 1"
    assert corpus.train.texts[:2] == ("train 0", "train 1")
    assert corpus.train.labels[:2] == (0, 1)
    assert corpus.test.texts[0] == "validation 0"
    assert (len(load().train), len(load().test)) == (40, 10), "without a test split a fifth of the other"
    with pytest.raises(ValueError, match=r"the label -1 .* is none of the 2 classes .* hidden as -1"):
        load(test_split="hidden")
    with pytest.raises(ValueError, match=r"data.test-split = 'test': cannot be loaded"):
        load(test_split="test")
    with pytest.raises(ValueError, match=r"data.text-column = 'text': no such column in data.train-split = 'train'"):
        load(text_column="text")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_corrupt_hub_data_set_is_refused(hub: Path) -> None:
    (hub / "data" / "train.parquet").write_bytes(b"PAR1 corrupt")
    with pytest.raises(ValueError, match=r"data.path = .*films' with data.train-split = 'train': cannot be loaded"):
        load_corpus(config(str(hub), name="hub"))


# -- prompts and answers ------------------------------------------------------------------------------

QUESTIONS = pd.DataFrame(
    {"question": ["one?", "two {x}?"] * 10, "hint": ["", "h"] * 10, "answer": ["1", "2"] * 10, "kind": ["a", "b"] * 10}
)


def asked(path: Path, **changes: Any) -> Config:
    QUESTIONS.to_parquet(path)
    data = {"name": "file", "path": str(path), "test_path": str(path), "partition": "iid", **changes}
    return Config(task="causal-lm", data=DataConfig(**data))


def test_prompts_come_from_a_column_or_a_template(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    plain = load_corpus(asked(path, text_column="question")).train
    assert (plain.texts[1], plain.answers[1], set(plain.labels)) == ("two {x}?", "2", {0})
    filled = load_corpus(asked(path, prompt_template="{{Q}} {question} ({hint})\nA:")).train
    assert filled.texts[:2] == ("{Q} one? ()\nA:", "{Q} two {x}? (h)\nA:")
    dealt = load_federated(asked(path, text_column="question", partition="dirichlet", label_column="kind"), 2)
    assert dealt.corpus.classes == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt_template": "{qestion} A:"},
            r"data.prompt-template = 'qestion': no such column .* Did you mean 'question'.* hint, answer, kind",
        ),
        ({"prompt_template": "no column"}, r"names no column; put one in braces"),
        ({"prompt_template": "{question"}, r"data.prompt-template = '\{question': .*write \{\{ and \}\}"),
        (
            {"text_column": "question", "answer_column": "anser"},
            r"data.answer-column = 'anser': no such column .* Did you mean 'answer'",
        ),
        (
            {"text_column": "question", "partition": "dirichlet"},
            r"data.label-column = 'label': no such column .* data.partition = 'dirichlet' deals rows by their category",
        ),
    ],
)
def test_bad_prompts_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(asked(tmp_path / "q.parquet", **changes))
