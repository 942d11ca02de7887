"""The corpus of a training and a test table: the split, the classes, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlora.config import Config
from fedlora.config.data_keys import as_option, write_names
from fedlora.data.chat import recognise
from fedlora.data.columns import FEW_CLASSES, RowColumns, Source, columns_of, read_rows
from fedlora.data.labels import plain_name
from fedlora.data.table import Corpus, Table
from fedlora.data.targets import (
    NUMBERED,
    VALUE,
    as_bits,
    check_spread,
    label_names,
)
from fedlora.seeded import Seeded

_TEST_SHARE = 0.2

Part = tuple[RowColumns, Source]
"""Rows, and the table that they are from."""


def build_corpus(train: Source, test: Source | None, config: Config, *, split: bool) -> Corpus:
    """Return the corpus of a training table and a test table.

    Without a test table a fifth is split off by the seed, or with ``split`` false there are no test rows. Class
    numbers follow ``data.classes``, or the sorted names of the labels in training where it is not set.

    Raises:
        ValueError: A column is missing, a row is empty, or the labels of the two tables do not fit.
    """
    rows = read_rows(train, config)
    if test is not None:
        test_rows = read_rows(test, config)
    elif not split:
        test_rows = RowColumns()
    else:
        if len(rows.texts) < 2:
            raise ValueError(f"{train.place}: has one row, and a fifth of the rows is tested on; add rows.")
        order = Seeded(config.seed).permutation("test-split", size=len(rows.texts))
        cut = max(1, round(len(order) * _TEST_SHARE))
        test_rows, rows = rows.take(np.sort(order[:cut]).tolist()), rows.take(np.sort(order[cut:]).tolist())
    shape = _shape(train, config)
    parts = ((rows, train), (test_rows, test or train))
    if config.task in NUMBERED:
        return _numbered(parts, config, shape)
    classes = config.data.class_names or tuple(sorted(set(rows.labels), key=_natural))
    if config.data.classes:
        _check_declared(classes, parts, config)
    elif config.task == "classification":
        _check_classes(classes, parts, config)
    else:
        test_rows.labels = [label if label in classes else classes[0] for label in test_rows.labels]
    number = {name: at for at, name in enumerate(classes)}

    def table(part: RowColumns) -> Table:
        return _table(part, labels=tuple(number[label] for label in part.labels))

    return Corpus(table(rows), table(test_rows), classes, shape=shape)


def _table(part: RowColumns, **more: Any) -> Table:
    columns = ("texts", "answers", "owners", "seconds", "chats")
    return Table(**{name: tuple(getattr(part, name)) for name in columns}, **more)


def _numbered(parts: Sequence[Part], config: Config, shape: str) -> Corpus:
    """Return the corpus of a task whose rows have numbers in place of one class."""
    (rows, train), (test_rows, test_source) = parts
    key = f"data.label-column = {config.data.label_column!r}"
    if config.task == "regression":
        check_spread(rows.values, key)
        own, test = (_table(part, numbers=tuple((value,) for value in part.values)) for part in (rows, test_rows))
        return Corpus(own, test, VALUE, shape=shape)
    columns = columns_of(train, config.data.label_column)
    names = label_names(rows.sets, config.data.class_names, columns if len(columns) > 1 else (), key)
    own_bits = as_bits(rows.sets, names, f"{key}: training rows", lambda at: train.row(rows.numbers[at]))
    bits = as_bits(test_rows.sets, names, f"{key}: test rows", lambda at: test_source.row(test_rows.numbers[at]))
    own, test = _table(rows, numbers=tuple(own_bits)), _table(test_rows, numbers=tuple(bits))
    return Corpus(own, test, names, shape=shape)


def _shape(source: Source, config: Config) -> str:
    """Return how the columns are read, in words, where their keys alone do not say it."""
    if config.task == "causal-lm":
        shape = recognise(source.frame, config.data)
        return shape.describe(source.frame.columns, config.data) if shape else ""
    texts = columns_of(source, config.data.text_column)
    return f"sentence pairs ({', '.join(texts)}), by the tokenizer's own pair encoding" if len(texts) > 1 else ""


def _first_row(label: str, parts: Sequence[Part]) -> str:
    """Return the first row with a label, for an error."""
    part, source = next((part, source) for part, source in parts if label in part.labels)
    return f"{source.row(part.numbers[part.labels.index(label)])} of {source.place}"


def _check_declared(classes: Sequence[str], parts: Sequence[Part], config: Config) -> None:
    unknown = sorted({label for part, _ in parts for label in part.labels} - set(classes), key=_natural)
    if not unknown:
        return
    plain = {plain_name(name): name for name in classes}
    place = (
        f"data.classes = {config.data.classes!r}: the label {unknown[0]!r} of data.label-column = "
        f"{config.data.label_column!r} in {_first_row(unknown[0], parts)} is none of them"
    )
    if other := plain.get(plain_name(unknown[0])):
        raise ValueError(
            f"{place}, and differs from {other!r} in case, spaces or the way to write a number alone; write them alike."
        )
    option = as_option("data.classes", write_names([*classes, *unknown]))
    raise ValueError(f"{place}; remove its rows, or add it" + (f": {option}" if len(unknown) < 20 else "."))


def _check_classes(classes: Sequence[str], parts: Sequence[Part], config: Config) -> None:
    (rows, train), (test_rows, test) = parts
    column = f"data.label-column = {config.data.label_column!r}"
    if len(classes) < 2:
        raise ValueError(
            f"{column}: all {len(rows.labels)} training rows have the one label {write_names(classes)}; classification "
            "needs two classes or more."
        )
    if len(classes) > max(FEW_CLASSES, len(rows.labels) // 2):
        raise ValueError(
            f"{column}: {len(classes)} different labels in {len(rows.labels)} training rows; this is not the column of "
            "the classes."
        )
    unknown = sorted(set(test_rows.labels) - set(classes), key=_natural)
    if unknown:
        source = test.key if test is not train else "data.path, of which a fifth is split off for testing"
        first = f"the first is {_first_row(unknown[0], parts)}"
        if other := {plain_name(name): name for name in classes}.get(plain_name(unknown[0])):
            raise ValueError(
                f"{source}: the label {unknown[0]!r} of the test rows and {other!r} of the training rows differ in "
                f"case, spaces or the way to write a number alone ({first}); write them alike."
            )
        raise ValueError(
            f"{source}: the label {unknown[0]!r} of the test rows is not among the {len(classes)} training labels "
            f"({write_names(classes[:10])}); it could never be predicted. Remove its rows ({first}), or add some to "
            "training."
        )


def _natural(label: str) -> tuple[int, float, str]:
    """Sort numbers by value, before texts."""
    try:
        number = float(label)
    except ValueError:
        return (1, 0.0, label)
    return (0, number, label) if math.isfinite(number) else (1, 0.0, label)  # "nan" is a language, too
