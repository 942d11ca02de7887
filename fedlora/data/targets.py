"""Labels of a row that are no single class: the number of a regression, or the several labels of a multi-label task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from fedlora.config import Options, require
from fedlora.data.labels import check_spellings, plain_name

if TYPE_CHECKING:
    import pandas as pd

NUMBERED = ("regression", "multi-label")
"""Tasks whose rows have numbers in place of one class."""
VALUE = ("value",)
"""The one name of a regression's output, in place of class names."""
_LARGEST, _SMALLEST = 100.0, 0.01  # size and spread of targets outside which nothing is learned
_WIDE, _NARROW = 10.0, 0.1  # outside which it is learned slowly
_BITS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}

Labels = tuple[str, ...]


@final
@dataclass(frozen=True)
class MultiLabelOptions(Options):
    """How a row's labels are written in one column of text."""

    section: ClassVar[str] = "multi-label"
    separator: str = "|"
    """What stands between labels where ``data.label-column`` is one column of text."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(self.separator.strip() != "", "multi-label.separator", self.separator, "must be a mark, such as '|'.")


# -- regression -----------------------------------------------------------------------------------------------


def read_numbers(column: pd.Series, place: str, where: Callable[[int], str]) -> list[float]:
    """Return a column of numbers.

    Args:
        column: The cells.
        place: Source and column, for errors.
        where: Returns how an error calls a row.

    Raises:
        ValueError: A cell is no finite number.
    """
    import pandas as pd

    plain = column.astype(object).map(_plain_number)
    numbers = pd.to_numeric(plain, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise ValueError(
            f"{place}: {len(bad)} rows have no finite number there, the first is {where(bad[0])} with "
            f"{str(column.iloc[bad[0]])[:40]!r}; task = 'regression' predicts a number. Remove or complete them, and "
            "write decimals with a point."
        )
    return [float(number) for number in numbers]


def _plain_number(cell: Any) -> Any:
    """Return a cell that is a number, or may be one as text; None for anything else."""
    if isinstance(cell, bool | np.bool_) or not isinstance(cell, str | int | float | np.number | Decimal):
        return None
    return float(cell) if isinstance(cell, Decimal) else cell


def check_spread(numbers: Sequence[float], key: str) -> None:
    """Refuse numbers to learn whose size or spread is far from one.

    They are learned as they are, so that an exported adapter puts out what was to be predicted. A model puts out
    numbers of about size one, and an optimizer's steps fit those.

    Raises:
        ValueError: They are all alike, or far from size one.
    """
    mean, spread = float(np.mean(numbers)), float(np.std(numbers))
    if spread == 0:
        raise ValueError(
            f"{key}: all {len(numbers)} training rows have the one number {mean:g}; nothing can be learned."
        )
    if spread < _SMALLEST or max(spread, abs(mean)) > _LARGEST:
        raise ValueError(
            f"{key}: the numbers of the training rows have mean {mean:g} and standard deviation {spread:g}; they are "
            "learned as they are, and a model learns numbers of about size one. Subtract a number such as "
            f"{mean:.3g}, divide by one such as {spread:.3g}, and undo both to read predictions."
        )


def spread_note(numbers: Sequence[float]) -> str:
    """Return what a plan says of numbers that are learned slowly; empty where there is nothing to say."""
    mean, spread = float(np.mean(numbers)), float(np.std(numbers))
    if spread >= _NARROW and max(spread, abs(mean)) <= _WIDE:
        return ""
    return (
        f"note: the numbers to learn have mean {mean:.3g} and standard deviation {spread:.3g}; numbers of about mean "
        "0 and deviation 1 are learned faster (they are learned as they are: scale them in the file)"
    )


# -- multi-label ----------------------------------------------------------------------------------------------


def read_bits(columns: Mapping[str, pd.Series], place: str, where: Callable[[int], str]) -> list[Labels]:
    """Return each row's labels from columns of 0 and 1, one a label.

    Raises:
        ValueError: A cell is neither 0 nor 1.
    """
    labels: list[list[str]] = [[] for _ in range(len(next(iter(columns.values()))))]
    for name, cells in columns.items():
        bits = cells.map(lambda cell: _BITS.get(str(cell).strip().lower()))
        bad = np.flatnonzero(bits.isna())
        if len(bad):
            raise ValueError(
                f"{place}: {len(bad)} rows of the column {name!r} hold neither 0 nor 1, the first is {where(bad[0])} "
                f"with {str(cells.iloc[bad[0]])[:40]!r}; with several label columns each is one label, 1 where a row "
                "has it."
            )
        for row in np.flatnonzero(bits.to_numpy(dtype=np.float64)):
            labels[row].append(name)
    return [tuple(one) for one in labels]


def read_lists(
    column: pd.Series, separator: str, place: str, where: Callable[[int], str], names: Sequence[str] = ()
) -> list[Labels]:
    """Return each row's labels from a column of lists, or of text with a separator; a row may have none.

    Args:
        column: The cells.
        separator: What stands between labels in text.
        place: Source and column, for errors.
        where: Returns how an error calls a row.
        names: Names of the labels' numbers, where the data set declares them.

    Raises:
        ValueError: A cell is neither, or holds a label twice; or two labels are one in two spellings.
    """
    rows = [_labels_of(cell, separator, f"{place}, {where(row)}") for row, cell in enumerate(column)]
    if all(isinstance(cell, str) for cell in column) and max(map(len, rows)) < 2:
        for mark in (",", ";", "|", "/"):
            if mark != separator and (sample := next((one[0] for one in rows if one and mark in one[0]), None)):
                raise ValueError(
                    f"{place}: no row holds the separator {separator!r}, and {sample[:40]!r} holds {mark!r}; set "
                    f"multi-label.separator = {mark!r} if it stands between labels, or task = 'classification' if each "
                    "row has one label."
                )
    for row, one in enumerate(rows):
        if len(set(one)) < len(one):
            raise ValueError(
                f"{place}, {where(row)}: names the label {Counter(one).most_common(1)[0][0]!r} twice. (Lists of 0 and "
                "1 are not read; give each label a column of its own and name them in data.label-column, with commas "
                "between.)"
            )
    said = [(row, label) for row, one in enumerate(rows) for label in one]
    check_spellings(
        [label for _, label in said], place, lambda at: where(said[at][0]), what="labels", cure="write them alike"
    )
    if names:
        number = {str(at): name for at, name in enumerate(names)}
        hidden = next((label for one in rows for label in one if label not in number), None)
        if hidden is not None:
            raise ValueError(f"{place}: the label {hidden} is none of the {len(names)} that the data set declares.")
        return [tuple(number[label] for label in one) for one in rows]
    return rows


def _labels_of(cell: Any, separator: str, place: str) -> Labels:
    if isinstance(cell, str):
        text = cell.strip()
        if text.startswith("[") and text.endswith("]"):
            raise ValueError(
                f"{place}: holds a written list, {text[:40]!r}; use jsonl or parquet for lists, or write labels with "
                f"{separator!r} between."
            )
        return tuple(part.strip() for part in text.split(separator) if part.strip())
    if isinstance(cell, list | tuple | np.ndarray):
        parts = list(cell)
        if all(isinstance(part, str | int | np.integer) and not isinstance(part, bool) for part in parts):
            return tuple(str(part).strip() for part in parts)
        raise ValueError(f"{place}: its list holds {str(parts)[:60]}, not names of labels.")
    raise ValueError(
        f"{place}: holds {str(cell)[:40]!r} ({type(cell).__name__}), neither a list of labels nor text; a row without "
        "labels has an empty list or text."
    )


def label_names(rows: Sequence[Labels], declared: Sequence[str], columns: Sequence[str], key: str) -> Labels:
    """Return the names of the labels, in the order of their numbers.

    Args:
        rows: The labels of each training row.
        declared: ``data.classes``.
        columns: The label columns, where each is a label; else empty.
        key: Key and value of the label column, for errors.

    Raises:
        ValueError: They do not fit together, or are not those of a multi-label task.
    """
    if columns and declared and set(columns) != set(declared):
        raise ValueError(
            f"{key}: data.classes names {', '.join(declared)}; with several label columns it must name just these, or "
            "be left out."
        )
    names = tuple(declared) or tuple(columns) or tuple(sorted({label for one in rows for label in one}))
    if len(names) < 2:
        raise ValueError(
            f"{key}: the training rows have the labels {', '.join(names) or '(none)'}; a multi-label task needs two or "
            "more."
        )
    if not declared and not columns and len(names) > max(20, len(rows) // 2):
        raise ValueError(
            f"{key}: {len(names)} different labels in {len(rows)} training rows; this is not the column of the labels."
        )
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(plain_name(name), name)
        if other != name:
            raise ValueError(
                f"{key}: the labels {other!r} and {name!r} differ in case or spaces alone; write them alike."
            )
    return names


def as_bits(
    rows: Sequence[Labels], names: Collection[str], place: str, where: Callable[[int], str]
) -> list[tuple[float, ...]]:
    """Return for each row 1 for each label that it has and 0 for the others.

    Args:
        rows: The labels of each row.
        names: All labels.
        place: What rows these are and whose names those, for errors.
        where: Returns how an error calls a row.

    Raises:
        ValueError: A row has a label that is not among the names.
    """
    unknown = sorted({label for one in rows for label in one} - set(names))
    if unknown:
        first = next(at for at, one in enumerate(rows) if unknown[0] in one)
        raise ValueError(
            f"{place}: the label {unknown[0]!r} is none of the {len(names)} labels ({', '.join(list(names)[:10])}); it "
            f"could never be predicted. Add it to data.classes, or remove its rows (the first is {where(first)})."
        )
    return [tuple(float(name in one) for name in names) for one in rows]
