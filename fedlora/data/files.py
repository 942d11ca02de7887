"""A user's own file: csv, tsv, JSON or parquet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from pyarrow.parquet import read_schema

from fedlora.config import Config
from fedlora.config.data_keys import TABLE_SUFFIXES, table_suffix, write_names
from fedlora.data.columns import Source
from fedlora.data.corpus import build_corpus
from fedlora.data.decoding import check_kind, read_text
from fedlora.data.table import Corpus, Table
from fedlora.data.targets import VALUE
from fedlora.data.text_files import parse_json, parse_separated
from fedlora.messages import first_line


def load_file_corpus(config: Config) -> Corpus:
    """Read ``data.path`` and ``data.test-path``; without the latter split a fifth off by the seed.

    Raises:
        ValueError: A file cannot be read, or its columns and rows do not fit.
    """
    data = config.data
    test = _source("data.test-path", data.test_path, data.header) if data.test_path and config.eval.test else None
    train = _source("data.path", data.path, data.header)
    return build_corpus(train, test, config, split=not data.test_path)


def load_own_rows(config: Config) -> Corpus:
    """Read ``data.path`` as a deployed site's own rows: none of them is set apart for a server's test.

    Raises:
        ValueError: As for :func:`load_file_corpus`.
    """
    return build_corpus(_source("data.path", config.data.path, config.data.header), None, config, split=False)


def load_server_rows(config: Config) -> Corpus:
    """Read ``data.test-path``, all that the server of deployed sites has; without it, there are no rows.

    Raises:
        ValueError: As for :func:`load_file_corpus`, or the classes are not given.
    """
    data = config.data
    if config.task in ("classification", "multi-label") and not data.classes:
        raise ValueError("data.classes = '': must name the classes; with deployed sites nobody sees all labels.")
    if not data.test_path or not config.eval.test:
        return Corpus(Table(), Table(), VALUE if config.task == "regression" else data.class_names)
    own = build_corpus(_source("data.test-path", data.test_path, data.header), None, config, split=False)
    return Corpus(Table(), own.train, own.classes)


def load_public_rows(config: Config, classes: Sequence[str]) -> Table:
    """Read ``data.public-path``, rows of the same columns and classes as those that clients have.

    Raises:
        ValueError: As for :func:`load_file_corpus`.
    """
    path, header = config.data.public_path, config.data.header
    names = write_names(classes) if config.task in ("classification", "multi-label") else ""
    data = replace(
        config.data,
        name="file",
        path=path,
        test_path="",
        subset="",
        test_split="",
        classes=names,
        partition="iid",  # nobody's, so that no column says whose they are
        partition_column="",
    )
    source = _source("data.public-path", path, header)
    return build_corpus(source, None, replace(config, data=data), split=False).train


def _source(key: str, name: str, header: bool) -> Source:
    """Return one file as a table.

    Raises:
        ValueError: It is not there, or cannot be read.
    """
    path, place = Path(name).expanduser(), f"{key} = {name!r}"
    try:
        if path.is_dir():
            raise ValueError(
                f"{place}: is a folder; name a file in it, or, where the folder is a data set in the hub's format or "
                "was saved by datasets, set data.path to it and leave data.name out."
            )
        if not path.is_file():
            hint = "" if path.is_absolute() else " Relative paths start where Flower's SuperLink was started."
            raise ValueError(f"{place}: no such file ({path.resolve()}).{hint}")
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"{place}: cannot be opened ({error.strerror}).") from error
    suffix = table_suffix(name)
    if not suffix:
        known = ", ".join(TABLE_SUFFIXES)
        raise ValueError(
            f"{place}: the name must end in .csv, .tsv, .jsonl or .parquet (known are {known}, and of texts these with "
            ".gz after them)."
        )
    try:
        if suffix == ".parquet":
            check_kind(head, binary=True)
            return Source(key, name, _parquet(path))
        text = read_text(path)
        separated = suffix in (".csv", ".tsv")
        parsed = parse_separated(text, tabs=suffix == ".tsv", header=header) if separated else parse_json(text)
    except (ValueError, OSError) as error:
        raise ValueError(f"{place}: cannot be read as {suffix[1:]}: {first_line(error)}.") from error
    frame = pd.DataFrame(parsed.rows, columns=list(parsed.columns), dtype=object)
    return Source(key, name, frame, numbered=separated and not header, lines=parsed.lines)


def _parquet(path: Path) -> pd.DataFrame:
    """Return a parquet file as a table.

    Raises:
        ValueError: It is broken, or has two columns of one name.
    """
    try:
        names = read_schema(path).names
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        frame = None if twice is not None else pd.read_parquet(path).reset_index(drop=True)
    except Exception as error:  # of every library that reads it
        raise ValueError(f"{first_line(error)}; write it again") from error
    if frame is None:
        raise ValueError(f"it has the column {twice!r} twice; rename or remove one")
    return frame
