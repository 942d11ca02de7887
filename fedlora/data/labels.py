"""Labels that are certainly mistakes: two spellings of one name, scores, a header line among the rows."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_DECIMAL = re.compile(r"[+-]?(\d*\.\d+([eE][+-]?\d+)?|\d+[eE]-\d+)")
_WHOLE = re.compile(r"([+-]?\d+)\.0*")
_SHOWN = 5  # rows that an error names


def plain_name(name: str) -> str:
    """Return a name without what two spellings of one name differ in: case, spaces, ``1.0`` for ``1``.

    Unicode has more than one way to write an accent, a wide letter or a space, and characters that do not show.
    """
    text = "".join(char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")
    text = " ".join(text.casefold().split())
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def check_spellings(labels: Sequence[str], place: str, where: Callable[[int], str], declared: Sequence[str]) -> None:
    """Refuse two labels that are one name in two spellings, unless both are declared as classes.

    Args:
        labels: The label of each row.
        place: What names the column in an error.
        where: Returns how an error calls a row.
        declared: The names in ``data.classes``.

    Raises:
        ValueError: There are such labels; it names both, and their rows.
    """
    counts = Counter(labels)
    spelled: dict[str, str] = {}
    for label in sorted(counts, key=lambda one: (-counts[one], one)):  # the commoner one is the right one, most likely
        other = spelled.setdefault(plain_name(label), label)
        if other != label and not {label, other} <= set(declared):
            raise ValueError(
                f"{place}: the labels {other!r} ({_rows(labels, other, where)}) and {label!r} "
                f"({_rows(labels, label, where)}) differ in case, spaces or the way to write a number alone; write "
                "them alike, or, if they are two classes, name both in data.classes."
            )


def check_header_rows(
    frame: pd.DataFrame, named: Sequence[Mapping[Any, str]], place: str, where: Callable[[int], str]
) -> None:
    """Refuse a row whose cells are the names of their columns: a header line among the rows (of joined files).

    Args:
        frame: The table.
        named: Groups of columns, with their names, which no row has in all of a group by chance. One column is no
            group: a label may well be called as its column is (``spam``).
        place: What names the table in an error.
        where: Returns how an error calls a row.

    Raises:
        ValueError: There is such a row.
    """
    for names in named:
        rows = list(range(len(frame))) if len(names) > 1 else []
        for column, name in names.items():
            cells = frame[column].tolist()
            rows = [row for row in rows if _is_name(cells[row], name)]
        if rows:
            raise ValueError(
                f"{place}: {', '.join(map(where, rows[:_SHOWN]))} has names of columns in place of values, a header "
                "line among the rows; remove it (or set data.header = true, if it is the first line of the file)."
            )


def _is_name(cell: Any, name: str) -> bool:
    return isinstance(cell, str) and len(cell) < 2 * len(name) + 8 and plain_name(cell) == plain_name(name)


def check_scores(labels: Sequence[str], place: str, where: Callable[[int], str], declared: Sequence[str]) -> None:
    """Refuse labels most of which are numbers with decimals, unless they are declared as classes.

    Raises:
        ValueError: They are; it names the first row of one.
    """
    names = dict.fromkeys(labels)
    scores = [name for name in names if _is_decimal(name) and name not in declared]
    if scores and (2 * len(scores) > len(names) or all(map(_is_number, names))):
        raise ValueError(
            f"{place}: its labels are numbers with decimals, such as {scores[0]} in {where(labels.index(scores[0]))}: "
            "scores, not classes. Learn them with task = 'regression', write classes in their place, or, if these are "
            "classes, name them in data.classes."
        )


def _is_decimal(label: str) -> bool:
    return bool(_DECIMAL.fullmatch(label.strip())) and not _WHOLE.fullmatch(label.strip())


def _is_number(label: str) -> bool:
    label = label.strip()
    return bool(_DECIMAL.fullmatch(label) or re.fullmatch(r"[+-]?\d+\.?", label))


def _rows(labels: Sequence[str], label: str, where: Callable[[int], str]) -> str:
    """Return the first rows with a label, for an error."""
    rows = [row for row, one in enumerate(labels) if one == label]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return ", ".join(map(where, rows[:_SHOWN])) + more
