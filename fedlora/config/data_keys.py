"""How keys of the section ``data`` are written: what a path names, and names of classes that hold commas."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

from fedlora.config.fields import ConfigError, to_toml

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
"""Endings of the files that can be read; those of texts also with ``.gz`` after them."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def table_suffix(path: str) -> str:
    """Return the ending of a file's name that says how it is read, without ``.gz``; empty if it says nothing."""
    name = path.lower()
    packed = name.endswith(".gz") and not name.endswith(".parquet.gz")
    suffix = Path(name.removesuffix(".gz") if packed else name).suffix
    return suffix if suffix in TABLE_SUFFIXES else ""


def corpus_of(path: str) -> str:
    """Return the ``data.name`` that a ``data.path`` by itself stands for: ``docstrings``, ``file`` or ``hub``.

    Raises:
        ConfigError: It is neither a file nor a folder, and no data set of the hub can have that name.
    """
    if not path:
        return "docstrings"
    if "://" in path:
        raise ConfigError(f"data.path = {path!r}: is an address; download the data, and name the file or folder.")
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        return "hub"
    if os.path.isfile(place) or table_suffix(path):
        return "file"
    if _HUB_NAME.fullmatch(path):
        return "hub"
    raise ConfigError(
        f"data.path = {path!r}: there is no such file or folder, and it is no name of a data set of the Hugging Face "
        "hub (owner/name)."
    )


def read_names(text: str) -> tuple[str, ...]:
    """Return names with commas between; one that holds a comma stands in double quotes, as in csv.

    Raises:
        ValueError: A quote is not closed.
    """
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    return tuple(name.strip() for row in rows for name in row)


def write_names(names: Iterable[str]) -> str:
    """Return names as :func:`read_names` reads them."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(names)
    return line.getvalue()


def as_option(key: str, text: str) -> str:
    """Return ``key='text'`` as a ``--run-config`` option takes it; a text that an option cannot hold as a TOML line."""
    return to_toml({key: text}).strip() if "'" in text or not text.isprintable() else f"{key}='{text}'"
