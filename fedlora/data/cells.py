"""What a cell of a user's table may hold, by what its column is for: text, names, whole numbers.

Text alone is trained on as text: nothing is ever turned into what Python prints for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

_NUMBERS = int | np.integer
_DECIMALS = float | np.floating | Decimal
_PRINTED_BYTES = re.compile(r"""b'.*'|b".*\"""", re.DOTALL)
# Beside text, by the key that names the column; any other column is text alone.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "data.label-column": (_NUMBERS, _DECIMALS, bool | np.bool_),
    "data.partition-column": (_NUMBERS, bool | np.bool_),
    "data.answer-column": (_NUMBERS,),
    "data.prompt-template": (_NUMBERS,),
}


def cell_text(cell: Any, key: str) -> str:
    """Return a cell as the text that it is, or the name or whole number that its column may hold.

    Whole numbers that a reader took for floats, as pandas does where a cell is empty, are whole again.

    Args:
        cell: The cell.
        key: The configuration key that names its column.

    Raises:
        ValueError: It is something else; the message says what, and the cure, and quotes nothing of it.
    """
    if isinstance(cell, str):
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            raise ValueError("half of a surrogate pair, which is no character; write the file again") from error
        return str(cell)
    allowed = _ALLOWED.get(key, ())
    if isinstance(cell, bool | np.bool_):
        if any(isinstance(cell, kind) for kind in allowed if kind is not _NUMBERS):
            return "true" if cell else "false"
    elif isinstance(cell, _DECIMALS) and _NUMBERS in allowed and _is_whole(cell):
        return str(int(cell))
    elif any(isinstance(cell, kind) for kind in allowed) and (isinstance(cell, _NUMBERS) or math.isfinite(cell)):
        return str(cell)
    raise ValueError(_called(cell))


def check_printed_bytes(texts: Sequence[str]) -> None:
    """Refuse a column of what Python prints for bytes, which a table of bytes that was saved as csv holds.

    Raises:
        ValueError: All of its texts are.
    """
    if texts and all(_PRINTED_BYTES.fullmatch(text) for text in texts):
        raise ValueError("bytes as Python prints them (b'...'); decode them before the file is written")


def _is_whole(cell: float | np.floating | Decimal) -> bool:
    return math.isfinite(cell) and cell == int(cell)


def _called(cell: Any) -> str:
    """Return what a cell is in words, and what to do about it."""
    match cell:
        case bytes() | bytearray() | memoryview():
            return "bytes, not text; decode them where the file is written, such as by text.decode('utf-8')"
        case dict():
            fields = ", ".join(map(str, list(cell)[:5]))
            return f"a struct (of {fields}), not text; make the field that is meant a column of its own"
        case list() | tuple() | set() | np.ndarray():
            return "a list, not text; join it to one text, or write one row for each of its parts"
        case bool() | np.bool_():
            return "true or false, not text; name the column that holds the text, or write it as text"
        case int() | np.integer():
            return "a whole number, not text; name the column that holds the text, or write it as text"
        case float() | np.floating() | Decimal():
            return "a number with decimals, not text; name the column that is meant, or write it as text"
    return f"a value of type {type(cell).__name__}, not text; write it as text"
