"""What cells may hold, labels that are certainly mistakes, and names of classes: refused with rows, or as declared."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import Config, ConfigError, DataConfig
from fedlora.config.data_keys import as_option, read_names, write_names
from fedlora.data import load_corpus
from fedlora.data.labels import plain_name
from simulations.options import read_options

TEXTS = [f"film {n}" for n in range(8)]
LABELS: list[Any] = ["good", "bad"] * 4


def classes_of(path: Path, texts: list[Any] = TEXTS, labels: list[Any] = LABELS, **changes: Any) -> tuple[str, ...]:
    """Return the classes of a table that is written as the path's ending says."""
    frame = pd.DataFrame({"text": texts, "label": labels})
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    data = DataConfig(path=str(path), **{"test_path": str(path), **changes})
    return load_corpus(Config(data=data)).classes


# -- only text is text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        (b"film", r"bytes, not text; decode them"),
        (["a", "film"], r"a list, not text; join it to one text"),
        ([{"role": "user", "content": "film"}], r"a list, not text"),
        ({"en": "film", "de": "Film"}, r"a struct \(of en, de\), not text; make the field that is meant a column"),
        (7, r"a whole number, not text; name the column that holds the text"),
        (0.5, r"a number with decimals, not text"),
        (True, r"true or false, not text"),
        (Decimal("1.5"), r"a number with decimals, not text"),
        (datetime.date(2026, 1, 1), r"a value of type date, not text; write it as text"),
    ],
)
def test_only_text_is_trained_on_as_text(cell: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"data.text-column = 'text': row 0 \(from 0\) of data.path = .*{what}"
    ) as caught:
        classes_of(tmp_path / "a.parquet", texts=[cell] * 8)
    assert "film" not in str(caught.value), "an error quotes no cell"


def test_one_cell_among_texts_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n{"text": 3, "label": 1}\n')
    with pytest.raises(ValueError, match=r"row 2 \(line 3\) of data.path = .* holds a whole number, not text"):
        load_corpus(Config(data=DataConfig(path=str(path))))
    path.write_text('{"text": "a", "label": 0}\n{"text": "\\ud800", "label": 1}\n')
    with pytest.raises(ValueError, match=r"row 1 \(line 2\) of .* holds half of a surrogate pair"):
        load_corpus(Config(data=DataConfig(path=str(path))))


def test_what_python_prints_for_bytes_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds bytes as Python prints them .*; decode them"):
        classes_of(tmp_path / "a.csv", texts=[f"b'film {n}'" for n in range(8)])
    assert classes_of(tmp_path / "a.csv", texts=["b'", *TEXTS[1:]]) == ("bad", "good"), "a text like any other"


def test_numbers_and_truths_are_names_and_whole_numbers_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    assert classes_of(path, labels=[True, False] * 4) == ("false", "true")
    assert classes_of(path, labels=[2, 10] * 4) == ("2", "10")
    assert classes_of(path, labels=[np.nan, 2, 10, 2][1:] * 2 + [2.0, 10.0]) == ("2", "10")
    for label, what in ((b"x", "bytes"), (["x"], "a list"), ({"x": 1}, "a struct")):
        with pytest.raises(ValueError, match=rf"data.label-column = 'label': row 0 .* holds {what}"):
            classes_of(path, labels=[label] * 8)
    frame = {"text": ["1 + 1", "2 + 2"] * 4, "answer": [2, 4] * 4, "label": [0.5, 1.5] * 4}
    pd.DataFrame(frame).to_parquet(path)
    asked = {"path": str(path), "test_path": str(path), "partition": "iid"}
    assert load_corpus(Config(task="causal-lm", data=DataConfig(**asked))).train.answers[:2] == ("2", "4")
    with pytest.raises(ValueError, match=r"data.answer-column = 'label': row 0 .* a number with decimals, not text"):
        load_corpus(Config(task="causal-lm", data=DataConfig(answer_column="label", label_column="x", **asked)))
    with pytest.raises(ValueError, match=r"data.prompt-template = 'label': row 0 .* a number with decimals, not text"):
        load_corpus(Config(task="causal-lm", data=DataConfig(prompt_template="{label}", **asked)))


# -- labels that are mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["Good", "good ", " GOOD", "\uff47\uff4f\uff4f\uff44", "good\u200b", "good\u00a0"])
def test_two_spellings_of_one_label_are_refused_with_their_lines(other: str, tmp_path: Path) -> None:
    labels = [*LABELS[:2], other, *LABELS[3:]]
    shown = "'good' (row 0 (line 2), row 4 (line 6), row 6 (line 8)) and"
    with pytest.raises(ValueError, match=r"differ in case, spaces .*; write them alike, or, .* name both in") as caught:
        classes_of(tmp_path / "a.csv", labels=labels)
    assert shown in str(caught.value)
    assert f"{other!r} (row 2 (line 4))" in str(caught.value)


@pytest.mark.parametrize(("one", "other"), [("1", "1.0"), ("Very  bad", "very bad"), ("café", "cafe\u0301")])
def test_more_than_one_way_to_write_a_name(one: str, other: str, tmp_path: Path) -> None:
    assert plain_name(one) == plain_name(other)
    with pytest.raises(ValueError, match=r"differ in case, spaces or the way to write a number alone"):
        classes_of(tmp_path / "a.csv", labels=[one, other, "x", "x"] * 2)


@pytest.mark.parametrize("pair", [("1", "10"), ("a b", "ab"), ("-1", "1"), ("c", "c++"), ("0", "00"), ("né", "ne")])
def test_names_that_differ(pair: tuple[str, str], tmp_path: Path) -> None:
    assert set(classes_of(tmp_path / "a.csv", labels=list(pair) * 4)) == set(pair)


def test_spellings_between_training_and_test_rows(tmp_path: Path) -> None:
    test = tmp_path / "test.csv"
    pd.DataFrame({"text": TEXTS, "label": ["Good", "bad"] * 4}).to_csv(test, index=False)
    with pytest.raises(
        ValueError, match=r"data.test-path: the label 'Good' of the test rows and 'good' of the training"
    ) as caught:
        classes_of(tmp_path / "a.csv", test_path=str(test))
    assert f"row 0 (line 2) of data.test-path = {str(test)!r}" in str(caught.value)
    with pytest.raises(ValueError, match=r"the label 'Good' .* none of them, and differs from 'good' in case, spaces"):
        classes_of(tmp_path / "a.csv", test_path=str(test), classes="good,bad")


def test_a_label_that_is_none_of_the_classes_is_shown_with_its_line(tmp_path: Path) -> None:
    """The file's own, also where a fifth of it was split off before."""
    path, labels = tmp_path / "a.csv", [*LABELS[:6], "fair", "bad"]
    for test_path in ("", str(path)):
        with pytest.raises(ValueError, match=r"the label 'fair' .* in row 6 \(line 8\) of data.path = .* none of them"):
            classes_of(path, labels=labels, test_path=test_path, classes="good,bad")
    test = tmp_path / "test.csv"
    pd.DataFrame({"text": TEXTS, "label": labels}).to_csv(test, index=False)
    with pytest.raises(
        ValueError, match=r"'fair' of the test rows is not .* \(the first is row 6 \(line 8\) of data.test"
    ):
        classes_of(path, test_path=str(test))


def test_declared_spellings_are_classes(tmp_path: Path) -> None:
    labels = ["US", "us"] * 4
    assert classes_of(tmp_path / "a.csv", labels=labels, classes="us,US") == ("us", "US")


def test_spaces_around_labels_are_none_of_theirs(tmp_path: Path) -> None:
    labels = [f" {label} " for label in LABELS]
    assert classes_of(tmp_path / "a.csv", labels=labels, classes="good,bad") == ("good", "bad")


@pytest.mark.parametrize("labels", [[0.1, 0.7], ["0.5", "1"], ["-1.5", "2e-3"], [".5", "n/a", "0.25"]])
def test_scores_are_no_classes(labels: list[Any], tmp_path: Path) -> None:
    labels = (labels * 8)[:8]
    with pytest.raises(
        ValueError, match=r"its labels are numbers with decimals, such as \S+ in row 0 \(line 2\): scores"
    ):
        classes_of(tmp_path / "a.csv", labels=labels)


def test_what_looks_like_scores_and_is_none(tmp_path: Path) -> None:
    assert classes_of(tmp_path / "a.csv", labels=[0.0, 1.0] * 4) == ("0.0", "1.0")
    assert classes_of(tmp_path / "a.csv", labels=["3.10", "3.11"] * 4, classes="3.10,3.11") == ("3.10", "3.11")
    assert classes_of(tmp_path / "a.csv", labels=["1.2.3", "v2.0"] * 4) == ("1.2.3", "v2.0")


@pytest.mark.parametrize("header", ["text,label", "Text , LABEL", "\ufefftext,label"])
def test_a_header_line_among_the_rows(header: str, tmp_path: Path) -> None:
    body = "".join(f"{text},{label}\n" for text, label in zip(TEXTS, LABELS, strict=True))
    path = tmp_path / "joined.csv"
    path.write_text(f"text,label\n{body}{header}\n{body}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 8 \(line 10\) has names of columns in place of values, a header line"):
        load_corpus(Config(data=DataConfig(path=str(path))))
    path.write_text(f"text,label\n{body}")
    with pytest.raises(ValueError, match=r"row 0 \(line 1\) has names of columns .* set data.header = true"):
        load_corpus(Config(data=DataConfig(path=str(path), header=False)))


def test_texts_in_two_spellings_are_still_no_labels(tmp_path: Path) -> None:
    texts = [*(f"film {n}" for n in range(30)), *(f"Film {n}" for n in range(30))]
    with pytest.raises(
        ValueError, match=r"60 different labels in 60 training rows; this is not the column of the classes"
    ):
        classes_of(tmp_path / "a.csv", texts=texts, labels=texts)


def test_a_label_may_be_called_as_its_column_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    pd.DataFrame({"text": ["text", *TEXTS[1:]], "spam": ["ham", "spam"] * 4}).to_csv(path, index=False)
    asked = DataConfig(path=str(path), test_path=str(path), label_column="spam")
    assert load_corpus(Config(data=asked)).classes == ("ham", "spam")


# -- names of classes -----------------------------------------------------------------------------------------


def test_class_names_with_commas(tmp_path: Path) -> None:
    """As an option has them, as TOML has them, as an error prints them."""
    labels = ["yes, please", "no"] * 4
    option = read_options(["data.classes='\"yes, please\",no'"])
    assert classes_of(tmp_path / "a.csv", labels=labels, classes=option["data.classes"]) == ("yes, please", "no")
    with pytest.raises(ValueError, match=r"'yes, please' .* is none of them; .* add it: ") as caught:
        classes_of(tmp_path / "a.csv", labels=labels, classes="maybe,no")
    pasted = read_options([str(caught.value).split("add it: ")[1]])
    assert classes_of(tmp_path / "a.csv", labels=labels, classes=pasted["data.classes"])[2] == "yes, please"
    with pytest.raises(ConfigError, match=r"data.classes = '\"a,b': must be two names or more, .* in double quotes"):
        DataConfig(path="a.csv", classes='"a,b')


names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=10).map(str.strip).filter(bool)


@given(st.lists(names, min_size=2, max_size=5))
def test_names_are_read_as_they_are_written(listed: list[str]) -> None:
    assert read_names(write_names(listed)) == tuple(listed)
    option = as_option("data.classes", write_names(listed))
    if not option.startswith("data.classes = "):  # else it is for a file
        assert read_options([option]) == {"data.classes": write_names(listed)}


# -- saved data sets ------------------------------------------------------------------------------------------


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": TEXTS, "label": [n % 2 for n in range(8)]}, features=features)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "dev": rows}).save_to_disk(tmp_path / "splits")

    def load(name: str, **changes: Any) -> tuple[int, int]:
        corpus = load_corpus(Config(data=DataConfig(path=str(tmp_path / name), **changes)))
        assert corpus.classes == ("neg", "pos")
        return len(corpus.train), len(corpus.test)

    assert load("one") == load("splits") == load("splits/train") == (6, 2)
    assert load("splits", test_split="dev") == (8, 8)
    with pytest.raises(ValueError, match=r"data.test-split = 'test': .* no such split\). Its splits: train, dev"):
        load("splits", test_split="test")
    with pytest.raises(ValueError, match=r"data.test-split = 'dev': .* no such split\). Its splits: train"):
        load("one", test_split="dev")
    with pytest.raises(ValueError, match=r"saved without configurations\). Leave data.subset = 'x' out"):
        load("one", subset="x")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"one' with data.train-split = 'train': cannot be loaded .* Save it again"):
        load("one")
    with pytest.raises(ValueError, match=r"labels.py': is a file; leave data.name out"):
        load_corpus(Config(data=DataConfig(name="hub", path=__file__)))
