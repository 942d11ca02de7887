"""From a table of a TOML file to a frozen dataclass, with one clear error for whatever does not fit.

For files that are no run configuration: a deployed site's and a coordinator's own. Nothing is left out silently: a
limit that is misspelt would be none.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from fedlora.messages import closest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    tuple[str, ...]: "a list of texts in quotes",
    dict[str, str]: "a table of texts in quotes",
}


def read_tables(path: Path, what: str) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Args:
        path: The file.
        what: What it holds, for the error.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} cannot be read from {path}: {error}") from error


def read_table(kind: type[Section], values: object, place: str) -> Section:
    """Return a table as the dataclass whose fields are its keys, written with hyphens.

    Args:
        kind: The dataclass; its fields are booleans, numbers, texts, lists of texts or tables of texts.
        values: The table.
        place: Where it is, for errors, such as ``site.toml [limits]``.

    Raises:
        ValueError: A key is unknown, missing or of another type, or values cannot work together.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}: must be a table.")
    hints = get_type_hints(kind)
    known = {item.name.replace("_", "-"): hints[item.name] for item in fields(kind)}
    given = {}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{place}: unknown key {key!r}.{closest(str(key), known)} Known: {', '.join(known)}.")
        given[key.replace("-", "_")] = _typed(value, known[key], f"{place}: {key} = {value!r}")
    for item in fields(kind):
        if item.name not in given and item.default is MISSING and item.default_factory is MISSING:
            key = item.name.replace("_", "-")
            raise ValueError(f"{place}: {key}: must be given, {_KINDS[known[key]]}.")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _typed(value: object, kind: Any, place: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    match value:
        case list() if kind == tuple[str, ...] and all(type(one) is str for one in value):
            return tuple(value)
        case dict() if kind == dict[str, str] and all(type(one) is str for one in value.values()):
            return value
        case bool() | int() | float() | str() if type(value) is kind:
            if type(value) is float and not math.isfinite(value):
                raise ValueError(f"{place}: must be a finite number.")
            return value
    raise ValueError(f"{place}: must be {_KINDS[kind]}.")
