"""Labels and owners that are certainly mistakes: two spellings of one name, scores, a header line among the rows."""

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


def check_spellings(
    names: Sequence[str], place: str, where: Callable[[int], str], *, what: str, cure: str, declared: Sequence[str] = ()
) -> None:
    """Refuse two names that are one in two spellings, unless both are declared.

    Args:
        names: The names in the table's order.
        place: What names the column in an error.
        where: Returns how an error calls the row of a name, by its place among them.
        what: What is named.
        cure: What to do about it.
        declared: Names that are meant as they are.

    Raises:
        ValueError: There are such names; it says both, and their rows.
    """
    counts = Counter(names)
    spelled: dict[str, str] = {}
    for name in sorted(counts, key=lambda one: (-counts[one], one)):  # the commoner one is the right one, most likely
        other = spelled.setdefault(plain_name(name), name)
        if other != name and not {name, other} <= set(declared):
            raise ValueError(
                f"{place}: the {what} {other!r} ({_rows(names, other, where)}) and {name!r} "
                f"({_rows(names, name, where)}) differ in case, spaces or the way to write a number alone; {cure}."
            )


def check_owners(owners: Sequence[str], place: str, where: Callable[[int], str]) -> None:
    """Refuse owners of rows that are one in two spellings: a partition would part the rows of one owner.

    Args:
        owners: The owner of each row.
        place: What names the column in an error.
        where: Returns how an error calls a row.

    Raises:
        ValueError: There are such owners; it names both, and their rows.
    """
    cure = "if they are one, their rows would be on two clients; write them alike, or make them differ"
    check_spellings(owners, place, where, what="owners", cure=cure)


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


def _rows(names: Sequence[str], name: str, where: Callable[[int], str]) -> str:
    """Return the first rows with a name, for an error."""
    rows = [row for row, one in enumerate(names) if one == name]
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return ", ".join(map(where, rows[:_SHOWN])) + more
