"""A user's own file: csv, tsv, jsonl or parquet."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fedlora.config import Config
from fedlora.data.columns import Source, build_corpus
from fedlora.data.table import Corpus, Table
from fedlora.data.targets import VALUE
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


def _source(key: str, name: str, header: bool) -> Source:
    """Return one file as a table."""
    path = Path(name).expanduser()
    if not path.is_file():
        hint = "" if path.is_absolute() else " Relative paths start where Flower's SuperLink was started."
        raise ValueError(f"{key} = {name!r}: no such file ({path.resolve()}).{hint}")
    frame = _frame(key, path, header)
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(
            f"{key} = {name!r}: its rows have more fields than its header names columns; put texts that hold the "
            "separator in quotes (csv), or use jsonl."
        )
    return Source(key, name, frame, numbered=not header and path.suffix.lower() in (".csv", ".tsv"))


def _frame(key: str, path: Path, header: bool) -> pd.DataFrame:
    kind = path.suffix.lower().lstrip(".")
    try:
        if kind in ("csv", "tsv"):
            # Text stays as it is: "NA", "null" or "1.0" are data, and quotes in tsv are not syntax.
            return pd.read_csv(
                path,
                sep="," if kind == "csv" else "\t",
                quoting=0 if kind == "csv" else 3,
                header=0 if header else None,
                dtype=str,
                keep_default_na=False,
                na_filter=False,
                encoding="utf-8",
            )
        if kind == "jsonl":
            return pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        if kind == "parquet":
            return pd.read_parquet(path).reset_index(drop=True)
    except Exception as error:  # the readers raise errors of many libraries
        raise ValueError(f"{key} = {str(path)!r}: cannot be read as {kind} ({first_line(error)}).") from error
    raise ValueError(f"{key} = {str(path)!r}: the name must end in .csv, .tsv, .jsonl or .parquet.")
