"""Data readers: files of every kind, the hub's format, prompts and answers, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedlora.config import Config, ConfigError, DataConfig
from fedlora.data import load_corpus, load_federated
from fedlora.data.files import load_file_corpus
from fedlora.data.table import Corpus
from fedlora.plugins import read_config
from tests.support.rows import ROWS, config, write


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


def test_a_hub_out_of_reach_is_said_at_once(tmp_path: Path) -> None:
    """In a process of its own, since the hub's address is read at import; the hub's client would try for 23 s."""
    code = (
        "from fedlora.data import load_corpus; from fedlora.plugins import read_config\n"
        "import time; begin = time.monotonic()\n"
        "try: load_corpus(read_config({'data.path': 'nobody/nothing'}))\n"
        "except ValueError as error: print(time.monotonic() - begin < 10, error)\n"
    )
    own = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "True data.path = 'nobody/nothing' with data.train-split = 'train': cannot be loaded "
    )
    assert "the Hugging Face hub cannot be reached). There is no local folder of that name" in done.stdout


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
    data = load_federated(asked(path, text_column="question", partition="dirichlet", label_column="kind"), 2)
    assert data.corpus.classes == ("a", "b")


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
            r"data.label-column = 'label': no such column .* data.partition = 'dirichlet' goes by the category of rows",
        ),
    ],
)
def test_bad_prompts_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_corpus(asked(tmp_path / "q.parquet", **changes))
