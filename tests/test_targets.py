"""Numbers, sets of labels and pairs from files: what is read, what is refused, and what a plan says of it."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from fedlora.config import ConfigError
from fedlora.data import Corpus, load_corpus, load_federated
from fedlora.plugins import read_config
from fedlora.reports.card import model_card
from fedlora.roles import Role
from fedlora.runs.privacy import without_privacy
from simulations.setup import resolve
from tests.support.plans import plan, shown
from tests.support.tiny import WORDS
from tests.support.trainers import dp_worker, instruction, tiny_worker

Rows = dict[str, list[Any]]


def save(path: Path, columns: Rows) -> str:
    frame = pd.DataFrame(columns)
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")), encoding="utf-8")
    return str(path)


def corpus(path: Path, task: str, columns: Rows, **changes: Any) -> Corpus:
    file = save(path, columns)
    flat = {"task": task, "data.name": "file", "data.path": file, "data.test-path": file, "data.partition": "iid"}
    return load_corpus(read_config({**flat, **changes}))


def texts(count: int) -> list[str]:
    return [f"{WORDS[n % 40]} {WORDS[(7 * n) % 40]}" for n in range(count)]


# -- regression ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_numbers(suffix: str, tmp_path: Path) -> None:
    read = corpus(tmp_path / f"a{suffix}", "regression", {"text": texts(3), "label": [1, 2.5, -0.25]})
    assert read.train.numbers == ((1.0,), (2.5,), (-0.25,))
    assert (read.classes, read.train.labels) == (("value",), ())


def number_files(folder: Path, numbers: list[float]) -> dict[str, Path]:
    """Write numbers with their texts as each kind of file does, at full length."""
    words = texts(len(numbers))
    rows = [{"text": word, "label": number} for word, number in zip(words, numbers, strict=True)]
    lines = [f"{word};{number!r}" for word, number in zip(words, numbers, strict=True)]
    written = {
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "array.json": json.dumps(rows),
        "columns.json": json.dumps({"text": words, "label": numbers}),
        "pandas.json": pd.DataFrame(rows).to_json(double_precision=15),
        "a.csv": "\n".join(["text,label", *(line.replace(";", ",") for line in lines)]),
        "a.tsv": "\n".join(["text\tlabel", *(line.replace(";", "\t") for line in lines)]),
    }
    for name, text in written.items():
        (folder / name).write_text(text)
    pd.DataFrame(rows).to_parquet(folder / "a.parquet")
    pd.DataFrame({"text": words, "label": [Decimal(repr(number)) for number in numbers]}).to_parquet(
        folder / "d.parquet"
    )
    return {path.name: path for path in sorted(folder.iterdir())}


def test_numbers_are_read_to_the_last_bit(tmp_path: Path) -> None:
    """By our own readers; and in a folder of the hub's format by datasets', but of JSON arrays, which it rounds."""
    drawn = np.random.default_rng(0).uniform(-3, 3, 300).tolist()
    numbers = [-0.3, 0.1 + 0.2, 1 / 3, 5e-12, 2.5, *drawn, *(round(number, 3) for number in drawn)]
    short = [round(number, 12) for number in numbers]  # what pandas' own 15 digits hold
    for name, path in number_files(tmp_path, short).items():
        flat = {"task": "regression", "data.path": str(path), "data.test-path": str(path), "data.partition": "iid"}
        assert [number for (number,) in load_corpus(read_config(flat)).train.numbers] == short, name
    whole = tmp_path / "whole"
    whole.mkdir()
    for name in ("lines.jsonl", "array.json", "columns.json", "a.csv", "a.tsv", "a.parquet"):
        path = number_files(whole, numbers)[name]
        flat = {"task": "regression", "data.path": str(path), "data.test-path": str(path), "data.partition": "iid"}
        assert [number for (number,) in load_corpus(read_config(flat)).train.numbers] == numbers, name
        if name not in ("lines.jsonl", "array.json", "a.parquet"):
            continue  # datasets' reader of csv leaves files open, and reads columns as one row of lists
        hub = tmp_path / f"hub-{name}"
        hub.mkdir()
        path.rename(hub / f"train{path.suffix}")
        flat = {"task": "regression", "data.path": str(hub), "data.test-split": "train", "data.partition": "iid"}
        read = np.array([number for (number,) in load_corpus(read_config(flat)).train.numbers])
        off = float(np.abs(read - np.array(numbers)).max())
        assert off == 0 if path.suffix != ".json" else off < 1e-10, name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["1", "2,5", "x"], r"2 rows have no finite number there, the first is row 1 .* with '2,5'; .*with a point"),
        ([1.0, 2.0, float("inf")], r"the first is row 2 .* with 'inf'"),
        ([1.0, None, 2.0], r"the first is row 1"),
        (["1", "", "2"], r"the first is row 1"),
        ([True, False, True], r"3 rows have no finite number"),
        ([[1], [2], [3]], r"3 rows have no finite number"),
        ([2.0, 2.0, 2.0], r"all 3 training rows have the one number 2; nothing can be learned"),
        ([1e5, 2e5, 3e5], r"mean 200000 and standard deviation 81649.7; .* divide by one such as 8.16e\+04"),
        ([1000.1, 1000.5, 1002.0], r"size one. Subtract a number such as 1e\+03"),
        ([0.001, 0.002, 0.003], r"learns numbers of about size one"),
    ],
)
def test_numbers_that_are_refused(values: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / "a.parquet", "regression", {"text": texts(3), "label": values})


# -- multi-label --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "labels", "changes"),
    [
        (".csv", {"label": ["b|a", "", "c", "a | c"]}, {}),
        (".csv", {"label": ["b;a", "", "c", "a; c"]}, {"multi-label.separator": ";"}),
        (".parquet", {"label": [["b", "a"], [], ["c"], ["a", "c"]]}, {}),
        (".jsonl", {"label": [["b", "a"], [], ["c"], ["a", "c"]]}, {}),
        (".csv", {"a": [1, 0, 0, 1], "b": [1, 0, 0, 0], "c": [0, 0, 1, 1]}, {"data.label-column": "a,b,c"}),
        (".parquet", {"a": [1.0, 0, 0, 1], "b": [True, False, False, False], "c": ["0", "0", "1", "1"]},
         {"data.label-column": "a, b, c"}),
    ],
)  # fmt: skip
def test_labels(suffix: str, labels: Rows, changes: dict[str, Any], tmp_path: Path) -> None:
    read = corpus(tmp_path / f"a{suffix}", "multi-label", {"text": texts(4), **labels}, **changes)
    assert read.classes == ("a", "b", "c")
    assert read.train.numbers == ((1, 1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 1))
    assert read.train == read.test
    declared = corpus(
        tmp_path / f"b{suffix}", "multi-label", {"text": texts(4), **labels}, **changes, **{"data.classes": "c,a,b"}
    )
    assert declared.classes == ("c", "a", "b")
    assert declared.train.numbers == ((0, 1, 1), (0, 0, 0), (1, 0, 0), (1, 1, 0))


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (["a,b", "b", "a"], {}, r"no row holds the separator '\|', and 'a,b' holds ','; set multi-label.separator"),
        (
            ["a|b", "A|a", "b"],
            {},
            r"labels 'a' \(row 0 .*, row 1 .*\) and 'A' \(row 1 \(from 0\)\) differ in case, spa",
        ),
        (["a", "b", "A"], {"data.classes": "a,A,b"}, r"labels 'A' \(row 2 .*\) and 'a' \(row 0 .*\) differ in case"),
        (["a|a", "b", "b"], {}, r"row 0 .*names the label 'a' twice"),
        ([[0, 0, 1], [1, 0, 0], [0, 1, 1]], {}, r"names the label '.' twice. \(Lists of 0 and 1 are not read"),
        ([["a", None], ["b"], ["b"]], {}, r"row 0 .*its list holds"),
        ([None, ["b"], ["b"]], {}, r"row 0 .*neither a list of labels nor text"),
        (["a", "a", ""], {}, r"the training rows have the labels a; a multi-label task needs two"),
        (["a|b", "c", ""], {"data.classes": "a,b"}, r"training rows: the label 'c' is none of the 2 labels \(a, b\)"),
        (["a|b", "b", "a"], {"multi-label.separator": " "}, r"multi-label.separator = ' ': must be a mark"),
    ],
)
def test_labels_that_are_refused(labels: list[Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / "a.parquet", "multi-label", {"text": texts(3), "label": labels}, **changes)


@pytest.mark.parametrize(
    ("cells", "changes", "message"),
    [
        ([0, 2, 1], {}, r"1 rows of the column 'b' hold neither 0 nor 1, the first is row 1 .* with '2'"),
        ([0, None, 1], {}, r"1 rows of the column 'b' hold neither 0 nor 1"),
        ([0, 1, 1], {"data.classes": "a,c"}, r"data.classes names a, c; with several label columns it must name just"),
        ([0, 1, 1], {"data.label-column": "a,bb"}, r"data.label-column = 'bb': no such column"),
        ([0, 1, 1], {"data.label-column": "a,text"}, r"is the text column"),
        ([0, 1, 1], {"data.label-column": "a,a"}, r"must name a column, or several, each once"),
    ],
)
def test_bits_that_are_refused(cells: list[Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    columns = {"text": texts(3), "a": [0, 1, 0], "b": cells}
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / "a.parquet", "multi-label", columns, **{"data.label-column": "a,b", **changes})


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("regression", {"label": ["1", "2", "x"]}, r"the first is row 2 \(line 4\) with 'x'"),
        (
            "multi-label",
            {"label": ["a|b", "a|b", "A"]},
            r"'a' \(row 0 \(line 2\), row 1 \(line 3\)\) and 'A' \(row 2 \(line 4\)\) differ",
        ),
        ("multi-label", {"label": ["a|b", "b", "c"], "data.classes": "a,b"}, r"\(the first is row 2 \(line 4\)\)"),
        ("multi-label", {"label": ["a|b", "b|b", "a"]}, r"row 1 \(line 3\): names the label 'b' twice"),
        ("multi-label", {"label": ["a|b", "b", "['a', 'b']"]}, r"row 2 \(line 4\): holds a written list"),
        (
            "multi-label",
            {"a": [0, 1, 2], "b": [0, 1, 1], "label": [0] * 3},
            r"'a' .*the first is row 2 \(line 4\) with",
        ),
    ],
)
def test_rows_are_named_with_their_lines(task: str, columns: Rows, message: str, tmp_path: Path) -> None:
    changes = {"data.label-column": "a,b"} if "a" in columns else {}
    changes |= {name: value for name, value in columns.items() if name.startswith("data.")}
    columns = {name: cells for name, cells in columns.items() if name not in changes}
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path / "a.csv", task, {"text": texts(3), **columns}, **changes)


def test_names_that_a_hub_data_set_declares(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "labels": List(ClassLabel(names=["joy", "fear", "awe"]))})
    rows = Dataset.from_dict({"text": texts(4), "labels": [[0, 2], [], [1], [2]]}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    flat = {"task": "multi-label", "data.name": "hub", "data.path": str(tmp_path), "data.label-column": "labels"}
    read = load_corpus(read_config({**flat, "data.test-split": "train", "data.partition": "iid"}))
    assert read.classes == ("awe", "fear", "joy")
    assert read.train.numbers == ((1, 0, 1), (0, 0, 0), (0, 1, 0), (1, 0, 0))


# -- pairs --------------------------------------------------------------------------------------------


def test_pairs(tmp_path: Path) -> None:
    columns = {"premise": texts(4), "hypothesis": texts(4)[::-1], "label": ["yes", "no"] * 2}
    keys = {"data.text-column": "premise, hypothesis"}
    read = corpus(tmp_path / "a.csv", "classification", columns, **keys)
    assert (read.train.texts, read.train.seconds) == (tuple(texts(4)), tuple(texts(4)[::-1]))
    assert read.shape == "sentence pairs (premise, hypothesis), by the tokenizer's own pair encoding"
    scored = {**columns, "label": [0.0, 1, 2, 3]}
    assert corpus(tmp_path / "b.csv", "regression", scored, **keys).train.seconds == tuple(texts(4)[::-1])
    one = {"a,b": texts(4), "label": ["yes", "no"] * 2}
    assert corpus(tmp_path / "c.csv", "classification", one, **{"data.text-column": "a,b"}).train.seconds == ()
    (tmp_path / "d.csv").write_text("\n".join(f"{one},two,{n % 2}" for n, one in enumerate(texts(8))))
    flat = {"data.name": "file", "data.path": str(tmp_path / "d.csv"), "data.header": False}
    numbered = load_corpus(read_config({**flat, "data.text-column": "0,1", "data.label-column": 2}))
    assert set(numbered.train.seconds) == {"two"}
    for text_column, message in (
        ("premise,hypothesis,label", r"is the text column"),
        ("premise,hypothesis,other", r"names 3 columns; a text is one, and a sentence pair is two"),
        ("premise,hypotesis", r"'hypotesis': no such column .* Did you mean 'hypothesis'"),
        ("premise,", r"must name a column, or several, each once"),
    ):
        with pytest.raises(ValueError, match=message):
            corpus(tmp_path / "a.csv", "classification", columns, **{"data.text-column": text_column})


# -- settings, plan, card -----------------------------------------------------------------------------

TASKS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "regression": ({"label": [float(n % 7) for n in range(60)]}, {}),
    "multi-label": ({"label": ["|".join("ab"[: n % 3]) for n in range(60)]}, {}),
    "pairs": ({"second": texts(60)[::-1], "label": ["x", "y"] * 30}, {"data.text-column": "text,second"}),
}


def keys(folder: Path, kind: str) -> dict[str, Any]:
    columns, changes = TASKS[kind]
    task = "classification" if kind == "pairs" else kind
    path = save(folder / "rows.csv", {"text": texts(60), **columns})
    return {"task": task, "data.path": path, "data.partition": "iid", **changes}


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_settings(task: str, tmp_path: Path) -> None:
    for partition in ("dirichlet", "shards"):
        with pytest.raises(ConfigError, match=rf"'{partition}': goes by the one class .*choose iid, quantity or"):
            resolve({"task": task, "data.partition": partition})
    flat = keys(tmp_path, task)
    with pytest.raises(ValueError, match=r"these rows have none, or several; choose iid, quantity or natural"):
        load_federated(read_config({**flat, "data.name": "file", "data.partition": "shards"}), 3)
    with pytest.raises(ValueError, match=r"the rows of data.name = 'docstrings' have one class each"):
        load_corpus(read_config({"task": task}))
    with pytest.raises(ConfigError, match=r"eval.target = 1.5: is an? .* here, between 0 and 1"):
        resolve({**flat, "data.name": "file", "eval.target": 1.5})


def test_a_regression_has_no_class_names() -> None:
    flat = {"task": "regression", "data.partition": "iid", "data.name": "file", "data.path": "x"}
    with pytest.raises(ConfigError, match=r"data.classes = 'a,b': is read by a task with classes"):
        resolve({**flat, "data.classes": "a,b"})


def test_plans(tmp_path: Path) -> None:
    for kind, measure in (("regression", "test pearson"), ("multi-label", "test f1 micro"), ("pairs", "test accuracy")):
        folder = tmp_path / kind
        folder.mkdir()
        text = " ".join(shown(plan(folder, **keys(folder, kind))).split())
        assert f"reported: {measure}" in text
        assert "4 clients, 48 training rows" in text
        assert ("sentence pairs (text, second)" in text) == (kind == "pairs")
        assert "note: the numbers to learn" not in text
    wide = {"text": texts(60), "label": [float(n) for n in range(60)]}
    flat = {"task": "regression", "data.path": save(tmp_path / "wide.csv", wide), "data.partition": "iid"}
    assert "note: the numbers to learn have mean" in shown(plan(tmp_path, **flat))


def test_a_plan_says_what_an_adapter_reads_and_puts_out(tmp_path: Path) -> None:
    for kind, texts, outputs in (
        ("regression", ["text"], ["value"]),
        ("multi-label", ["text"], ["a", "b"]),
        ("pairs", ["text", "second"], ["x", "y"]),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        record = plan(folder, **keys(folder, kind)).record()
        assert (record["texts"], record["outputs"]) == (texts, outputs)


def test_cards(tmp_path: Path) -> None:
    for kind, parts in (
        ("regression", ["num_labels=1", 'problem_type="regression"', "tokenizer(TEXTS, padding"]),
        ("multi-label", ["num_labels=2", 'problem_type="multi_label_classification"', '`["a", "b"]`']),
        ("pairs", ["num_labels=2", "tokenizer(TEXTS, SECOND_TEXTS, padding"]),
    ):
        config = resolve({"data.name": "file", **keys(tmp_path, kind)})
        classes = load_corpus(config).classes
        card = model_card(config, classes, {}, {"head": Role.SHARED}, without_privacy({}), 1)
        assert all(part in card for part in parts)
        assert ("Classes, in order" in card) == (kind != "regression")
        assert ("problem_type" in card) == (kind != "pairs")


# -- a client's round ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TASKS)
def test_clients_train_and_measure(kind: str, tmp_path: Path) -> None:
    """From the file to updates, sums over held-out rows and facts of test rows; under DP nothing of them leaves."""
    flat = {**keys(tmp_path, kind), "method.head": "personal"}
    worker = tiny_worker(tmp_path, **flat)
    asked = instruction(worker)
    assert all(update.report.reason == "" for update in worker.train(asked))
    task = worker.loaded.model.engine.task
    for report in worker.report(instruction(worker, number=2)):
        means = {name: value / report.examples for name, value in report.metrics.items()}
        assert all(np.isfinite(value) for value in task.metrics(means).values())
    private = dp_worker(tmp_path, **{**flat, "method.head": "shared"})
    for update in private.train(instruction(private)):
        assert update.report.reason == ""
        assert update.report.metrics == {}
