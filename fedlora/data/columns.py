"""From the columns of somebody's table to rows: texts, labels, answers, owners."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fedlora.config import Config, DataConfig
from fedlora.config.data_keys import table_suffix
from fedlora.config.data_section import column_names
from fedlora.data.cells import cell_text, check_printed_bytes
from fedlora.data.chat import Shape, alpaca_prompts, read_chats, recognise
from fedlora.data.labels import check_header_rows, check_owners, check_scores, check_spellings
from fedlora.data.table import Turn
from fedlora.data.targets import (
    NUMBERED,
    MultiLabelOptions,
    read_bits,
    read_lists,
    read_numbers,
)
from fedlora.messages import closest

FEW_CLASSES = 20  # that a table may have, however few its rows
_UNNAMED = "all"  # the one category of rows that have none


@dataclass(frozen=True)
class Source:
    """A user's table, with the name that errors use.

    Attributes:
        key: The configuration key that names it.
        name: Its value.
        frame: The table.
        numbered: Whether its columns have numbers and no names.
        class_names: Names of the label column's numbers, where the data set declares them.
        lines: The line of the file where each row begins, where rows are on lines.
    """

    key: str
    name: str
    frame: pd.DataFrame
    numbered: bool = False
    class_names: Sequence[str] = ()
    lines: Sequence[int] = ()

    @property
    def place(self) -> str:
        """The source in an error message."""
        return f"{self.key} = {self.name!r}"

    def row(self, number: int) -> str:
        """Return a row in an error message."""
        return f"row {number} ({f'line {self.lines[number]}' if self.lines else 'from 0'})"


@dataclass
class RowColumns:
    """A table's rows as columns of one length, ``numbers`` their places in it; what the task does not read is empty."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    seconds: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    sets: list[tuple[str, ...]] = field(default_factory=list)
    chats: list[tuple[Turn, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def take(self, rows: Sequence[int]) -> RowColumns:
        """Return these rows, in this order."""
        return RowColumns(*([column[row] for row in rows] if column else [] for column in vars(self).values()))


def read_rows(source: Source, config: Config) -> RowColumns:
    """Return the rows of one table."""
    data, language = config.data, config.task == "causal-lm"
    rows = RowColumns(numbers=list(range(len(source.frame))))
    check_header_rows(source.frame, _header_groups(source, config), source.place, source.row)
    shape = recognise(source.frame, data) if language else None
    if shape is not None:
        _read_shape(rows, source, shape, data)
    elif language:
        if data.prompt_template:
            rows.texts = _prompts(source, data.prompt_template)
        else:
            _refuse_pairs(source, data)
            rows.texts = _texts(source, "data.text-column", data.text_column)
        rows.answers = _texts(source, "data.answer-column", data.answer_column)
    else:
        rows.texts, *more = (_texts(source, "data.text-column", name) for name in _text_columns(source, data))
        rows.seconds = more[0] if more else []
    if config.task in NUMBERED:
        _read_numbers(rows, source, config)
    elif not language or data.partition in ("dirichlet", "shards"):
        rows.labels = _labels(source, config)
    else:
        rows.labels = [_UNNAMED] * len(rows.texts)
    if data.partition_column:
        rows.owners = _texts(source, "data.partition-column", data.partition_column)
        place = f"data.partition-column = {data.partition_column!r} of {source.place}"
        check_owners(rows.owners, place, source.row)
    return rows


def _header_groups(source: Source, config: Config) -> list[dict[Any, str]]:
    """Return columns with their names, by groups that all have their names in a header line among the rows."""
    data = config.data
    columns: list[Any] = list(source.frame.columns)
    if source.numbered:
        return [{column: name for column, name in enumerate(("text", "label")) if column in columns}]
    other = data.answer_column if config.task == "causal-lm" else data.label_column
    return [
        {column: str(column) for column in columns},
        {name: name for name in (data.text_column, other) if name in columns},
    ]


def columns_of(source: Source, wanted: str) -> tuple[str, ...]:
    """Return the columns that a key names, with commas between; a column whose own name has commas is one."""
    return (wanted,) if wanted in source.frame.columns else column_names(wanted)


def _text_columns(source: Source, data: DataConfig) -> tuple[str, ...]:
    """Return the column of texts, or the two of a sentence pair."""
    columns = columns_of(source, data.text_column)
    if len(columns) > 2:
        raise ValueError(
            f"data.text-column = {data.text_column!r}: names {len(columns)} columns; a text is one, and a sentence "
            "pair is two. Put more into one column before."
        )
    return columns


def _refuse_pairs(source: Source, data: DataConfig) -> None:
    """Refuse several columns for the one prompt of a language model."""
    names = columns_of(source, data.text_column)
    if len(names) > 1:
        raise ValueError(
            f"data.text-column = {data.text_column!r}: a language model reads one prompt, not a sentence pair; write "
            f"the columns into one by data.prompt-template = {' '.join(f'{{{name}}}' for name in names)!r}."
        )


def _read_shape(rows: RowColumns, source: Source, shape: Shape, data: DataConfig) -> None:
    """Read chat data."""

    def texts(column: str, *, empty: bool = False) -> list[str]:
        return _texts(source, "data.text-column", column, empty=empty)

    if source.frame.empty:
        raise ValueError(f"{source.place}: there are no rows.")
    if shape.column or data.chat_template:
        rows.chats = read_chats(shape, source.frame, texts, data.learn, source.place)
        rows.texts = [next(turn.content for turn in turns if turn.role == "user") for turns in rows.chats]
        rows.answers = [turns[-1].content for turns in rows.chats]
    else:
        rows.texts = alpaca_prompts(shape, texts)
        rows.answers = _texts(source, "data.answer-column", "output")


def _read_numbers(rows: RowColumns, source: Source, config: Config) -> None:
    """Read what a regression or a multi-label task predicts."""
    key, wanted = "data.label-column", config.data.label_column
    columns = columns_of(source, wanted)
    place = f"{key} = {wanted!r}: {source.place}"
    cells = {name: source.frame[_column(source, key, name)] for name in columns}
    if source.frame.empty:
        raise ValueError(f"{source.place}: there are no rows.")
    if config.task == "multi-label":
        if len(columns) > 1:
            rows.sets = read_bits(cells, place, source.row)
        else:
            separator = config.options(MultiLabelOptions).separator
            rows.sets = read_lists(cells[columns[0]], separator, place, source.row, source.class_names)
    elif len(columns) > 1:
        raise ValueError(f"{key} = {wanted!r}: names {len(columns)} columns; task = 'regression' predicts one number.")
    else:
        rows.values = read_numbers(cells[columns[0]], place, source.row)


def _prompts(source: Source, template: str) -> list[str]:
    """Return the template filled with each row's columns."""
    key = "data.prompt-template"
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{key} = {template!r}: {error}; write {{{{ and }}}} for braces that are text.") from error
    if not names:
        raise ValueError(f"{key} = {template!r}: names no column; put one in braces, such as {{question}}.")
    columns: Mapping[str, list[str]] = {name: _texts(source, key, name, empty=True) for name in dict.fromkeys(names)}
    return [template.format(**dict(zip(columns, cells, strict=True))) for cells in zip(*columns.values(), strict=True)]


def _labels(source: Source, config: Config) -> list[str]:
    """Return the label of each row, or for a language model its category, without outer spaces.

    Raises:
        ValueError: There is no such column, a row has no label, or labels are certainly mistakes.
    """
    data, column = config.data, config.data.label_column
    try:
        labels = _texts(source, "data.label-column", column)
    except ValueError as error:
        if config.task != "causal-lm":
            raise
        raise ValueError(
            f"{error} data.partition = {data.partition!r} goes by the category of rows; choose iid, quantity or "
            "natural where there is none."
        ) from error
    if source.class_names:
        return _declared_names(source, column, labels)
    place = f"data.label-column = {column!r} of {source.place}"
    if config.task == "classification":
        check_scores(labels, place, source.row, data.class_names)
        if len(set(labels)) > max(FEW_CLASSES, 0.75 * len(labels)) and not data.classes:
            return labels  # texts, and no labels at all: refused when all rows are there
    cure = "write them alike, or, if they are two classes, name both in data.classes"
    check_spellings(labels, place, source.row, what="labels", cure=cure, declared=data.class_names)
    return [label.strip() for label in labels]


def _declared_names(source: Source, column: str, labels: Sequence[str]) -> list[str]:
    """Return the names that a data set of the hub declares for its labels' numbers."""
    names = {str(number): name for number, name in enumerate(source.class_names)}
    hidden = next((label for label in labels if label not in names), None)
    if hidden is not None:
        raise ValueError(
            f"{source.place}: the label {hidden} of its column {column!r} is none of the {len(names)} classes that the "
            "data set declares (test labels of a competition are often hidden as -1); choose another split."
        )
    return [names[label] for label in labels]


def _texts(source: Source, key: str, wanted: str, *, empty: bool = False) -> list[str]:
    """Return a column as texts; whole numbers that a reader took for floats are whole again.

    Raises:
        ValueError: There is no such column, or a cell has nothing in it (allowed with ``empty``).
    """
    column = _column(source, key, wanted)
    if source.frame.empty:
        raise ValueError(f"{source.place}: there are no rows.")
    cells = source.frame[column]
    texts: list[str] = []
    try:
        for cell, missing in zip(cells, cells.isna(), strict=True):
            texts.append("" if missing else cell_text(cell, key))
    except ValueError as error:
        raise ValueError(f"{key} = {wanted!r}: {source.row(len(texts))} of {source.place} holds {error}.") from error
    if key == "data.text-column":
        try:
            check_printed_bytes(texts)
        except ValueError as error:
            raise ValueError(f"{key} = {wanted!r}: the column of {source.place} holds {error}.") from error
    bad = [row for row, text in enumerate(texts) if not text.strip()]
    if bad and not empty:
        what = key.removeprefix("data.").removesuffix("-column").replace("partition", "owner")
        raise ValueError(
            f"{source.place}: {len(bad)} rows have no {what} (column {wanted!r}), the first is {source.row(bad[0])}; "
            "remove or complete them."
        )
    return texts


def _column(source: Source, key: str, wanted: str) -> Any:
    """Return the label by which the frame knows a column."""
    columns: list[Any] = list(source.frame.columns)
    if source.numbered:
        default = {"text": 0, "label": 1, "answer": 1}.get(wanted)
        number = int(wanted) if wanted.isdecimal() else default
        if number not in columns:
            raise ValueError(
                f"{key} = {wanted!r}: {source.place} has {len(columns)} columns without names, counted from 0."
            )
        return number
    if wanted not in columns:
        names = [str(column) for column in columns]
        separated = table_suffix(source.name) in (".csv", ".tsv")
        hint = " (A file without a header line needs data.header = false.)" if separated else ""
        raise ValueError(
            f"{key} = {wanted!r}: no such column in {source.place}.{closest(wanted, names)} "
            f"Its columns: {', '.join(names[:20])}.{hint}"
        )
    return wanted
