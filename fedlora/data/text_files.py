"""Tables in text: csv, tsv and JSON, parsed strictly, each row with the line where it begins.

A reader that mends what is broken (takes a field for an index, fills a short row, swallows lines up to the next quote)
trains a model on something else than the user sees, so what does not fit is an error with its line. Errors say nothing
of what stands in a line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_LINE_END = re.compile(r"\r\n|\r|\n")
_OPENED = re.compile(r'(?:\A|[\t\r\n])"')
_TOLD = re.compile(r"(sep=(.))[\r\n]")
_OTHER_SEPARATORS = (";", "\t", "|")

Row = tuple[int, list[str]]


@dataclass(frozen=True)
class Parsed:
    """A table as it stands in a file.

    Attributes:
        columns: Their names, or their numbers where they have none.
        rows: The cells of each row.
        lines: The line where each row begins, from 1; empty where rows are not on lines.
    """

    columns: Sequence[str] | Sequence[int]
    rows: Sequence[Sequence[Any]]
    lines: Sequence[int]


# -- csv and tsv ----------------------------------------------------------------------------------------------


def parse_separated(text: str, *, tabs: bool, header: bool) -> Parsed:
    """Return the table in a csv or, with ``tabs``, a tsv.

    Cells stay as they are: ``NA``, ``null`` and ``1.0`` are data.

    Raises:
        ValueError: A line is broken, or a column is named twice.
    """
    rows = _tsv(text) if tabs else _csv(text, header=header)
    if not rows:
        raise ValueError("it is empty")
    columns: Sequence[str] | Sequence[int] = range(len(rows[0][1]))
    named = "its first line has"
    if header:
        _, names = rows.pop(0)
        columns = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(names)]
        named = "its header names"
        twice = next((name for name, count in Counter(columns).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"its header names the column {twice!r} twice; rename or remove one")
        if not rows:
            raise ValueError("there are no rows after its header")
    for line, cells in rows:
        if len(cells) > len(columns):
            raise ValueError(
                f"line {line} has {len(cells)} fields, more fields than {named} columns ({len(columns)}); put texts "
                f"that hold the separator in quotes{'' if tabs else ' (csv)'}, or use jsonl"
            )
        if len(cells) < len(columns):
            raise ValueError(
                f"line {line} has {len(cells)} field(s), fewer fields than {named} columns ({len(columns)}); complete "
                "it, or put texts that hold a line's end in quotes"
            )
    return Parsed(columns, [cells for _, cells in rows], [line for line, _ in rows])


def _csv(text: str, *, header: bool) -> list[Row]:
    """Return the fields of a csv, whose separator may be another where its header holds no comma."""
    if told := _TOLD.match(text):  # by Excel, which reads this line and shows it to nobody
        return _fields(text[told.end(1) :], told[2], quoted=True)
    first = next(iter(io.StringIO(text.lstrip("\r\n"), newline="")))
    others = [sign for sign in _OTHER_SEPARATORS if header and "," not in first and sign in first]
    return _fields(text, others[0] if others else ",", quoted=True)


def _tsv(text: str) -> list[Row]:
    """Return the fields of a tsv.

    Some programs write texts with quotes as csv does, in quotes and the quotes doubled, and for others a quote is a
    sign like any other. The file decides: quotes are syntax where all fits that reading, and either a quoted field
    has doubled quotes, or all texts are in quotes, or no other reading gives rows of one length.
    """
    plain = _fields(text, "\t", quoted=False)
    if not _OPENED.search(text):
        return plain
    try:
        quoted = _fields(text, "\t", quoted=True)
    except ValueError:
        return plain
    fields = [field for _, fields in plain for field in fields]
    syntax = any(_doubled(field) for field in fields) or all(_in_quotes(field) or _number(field) for field in fields)
    return quoted if _even(quoted) and (syntax or not _even(plain)) else plain


def _in_quotes(field: str) -> bool:
    return len(field) > 1 and field[0] == field[-1] == '"'


def _doubled(field: str) -> bool:
    """Return whether a field is in quotes, and all quotes in it are doubled, of which it has some."""
    inner = field[1:-1]
    return _in_quotes(field) and '""' in inner and '"' not in inner.replace('""', "")


def _number(field: str) -> bool:
    try:
        float(field or "0")
    except ValueError:
        return False
    return True


def _even(rows: Sequence[Row]) -> bool:
    return len({len(cells) for _, cells in rows}) == 1


def _fields(text: str, separator: str, *, quoted: bool) -> list[Row]:
    """Return the fields of each line that is not blank, with its number."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    rows: list[Row] = []
    line = 1
    limit = csv.field_size_limit(len(text) + 1)  # the module's own, 128 KiB, is less than a long text
    try:
        for cells in reader:
            if len(cells) > 1 or (cells and cells[0].strip()):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"line {line}: a quote is opened and not closed where its field ends ({error}); double quotes that are "
            "part of a quoted text"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


# -- JSON -----------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Parsed:
    """Return the table in JSON lines, in an array of objects, or in an object of columns (lists, or as pandas does it).

    Raises:
        ValueError: A line or the whole is broken, or is none of these.
    """
    lines = [(number, line) for number, line in enumerate(_LINE_END.split(text), start=1) if line.strip()]
    try:
        whole = _value(text)
    except ValueError as error:
        if _is_by_line(error, [line for _, line in lines]):
            return _objects([_line(number, line) for number, line in lines], [number for number, _ in lines])
        if isinstance(error, json.JSONDecodeError):
            raise ValueError(f"line {error.lineno} is not JSON ({error.msg} at column {error.colno})") from error
        raise
    if isinstance(whole, dict) and (columns := _columns(whole)):
        return Parsed(list(whole), list(zip(*columns, strict=True)), ())
    if isinstance(whole, dict) and len(lines) > 1:
        raise ValueError("it is one object; write an array of objects, one a row, or one object a line (jsonl)")
    return _objects(whole, ()) if isinstance(whole, list) else _objects([whole], [lines[0][0]])


def _is_by_line(error: ValueError, lines: Sequence[str]) -> bool:
    """Return whether a text that is not one JSON value is meant to have one on each line."""
    goes_on = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
    return goes_on or (len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines[:2]))


def _objects(values: Sequence[Any], lines: Sequence[int]) -> Parsed:
    for row, value in enumerate(values):
        if not isinstance(value, dict):
            where = f"line {lines[row]}" if lines else f"element {row} (from 0)"
            raise ValueError(f"{where} is no object; each row must be one, with the columns' names as keys")
    columns = list(dict.fromkeys(itertools.chain.from_iterable(values)))
    if not columns:
        raise ValueError("it is empty")
    return Parsed(columns, [[value.get(name) for name in columns] for value in values], lines)


def _columns(value: dict[str, Any]) -> list[list[Any]]:
    """Return the columns that an object holds: lists of one length, or objects with the same keys; else nothing."""
    columns = list(value.values())
    if len(columns) > 1 and all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        return [list(column.values()) for column in columns]
    if len(columns) > 1 and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return columns
    return []


def _line(number: int, line: str) -> Any:
    try:
        return _value(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _value(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    items = list(pairs)
    value = dict(items)
    if len(value) < len(items):
        name = next(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        raise ValueError(f"an object has the key {name!r} twice; rename or remove one")
    return value
