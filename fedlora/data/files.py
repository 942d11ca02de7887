"""A user's own file: csv, tsv, jsonl or parquet, with a text and a label column."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedlora.config import DataConfig
from fedlora.data.table import Corpus, Table
from fedlora.registry import closest
from fedlora.seeded import Seeded

_TEST_SHARE = 0.2


def load_file_corpus(config: DataConfig, seed: int) -> Corpus:
    """Read ``data.path`` and ``data.test-path``; without the latter split a fifth off by the seed.

    Class numbers follow the sorted names of the labels in the training file.

    Raises:
        ValueError: A file cannot be read, a column is missing, a row is empty, or the labels of the two
            files do not fit.
    """
    texts, labels = _read("data.path", config.path, config)
    if config.test_path:
        test_texts, test_labels = _read("data.test-path", config.test_path, config)
    else:
        order = Seeded(seed).permutation("test-split", size=len(texts))
        cut = max(1, round(len(texts) * _TEST_SHARE))
        test_rows, rows = np.sort(order[:cut]), np.sort(order[cut:])
        test_texts, test_labels = [texts[row] for row in test_rows], [labels[row] for row in test_rows]
        texts, labels = [texts[row] for row in rows], [labels[row] for row in rows]
    classes = tuple(sorted(set(labels), key=_natural))
    if len(classes) < 2:
        raise ValueError(
            f"data.label-column = {config.label_column!r}: all {len(labels)} training rows have the one label "
            f"{', '.join(classes)}; classification needs two classes or more."
        )
    if len(classes) > max(20, len(labels) // 2):
        raise ValueError(
            f"data.label-column = {config.label_column!r}: {len(classes)} different labels in {len(labels)} training "
            "rows; this is not the column of the classes."
        )
    unknown = sorted(set(test_labels) - set(classes))
    if unknown:
        source = "data.test-path" if config.test_path else "data.path, of which a fifth is split off for testing"
        raise ValueError(
            f"{source}: the label {unknown[0]!r} of the test rows is not among the {len(classes)} training labels "
            f"({', '.join(classes[:10])}); it could never be predicted. Remove its rows, or add some to training."
        )
    number = {name: at for at, name in enumerate(classes)}
    return Corpus(
        Table(tuple(texts), tuple(number[label] for label in labels)),
        Table(tuple(test_texts), tuple(number[label] for label in test_labels)),
        classes,
    )


def _natural(label: str) -> tuple[int, float, str]:
    """Sort numbers by value, before texts."""
    try:
        number = float(label)
    except ValueError:
        return (1, 0.0, label)
    return (0, number, label) if math.isfinite(number) else (1, 0.0, label)  # "nan" is a language, too


def _read(key: str, name: str, config: DataConfig) -> tuple[list[str], list[str]]:
    """Return the texts and labels of one file."""
    path = Path(name).expanduser()
    if not path.is_file():
        hint = "" if path.is_absolute() else " Relative paths start where Flower's SuperLink was started."
        raise ValueError(f"{key} = {name!r}: no such file ({path.resolve()}).{hint}")
    frame = _frame(key, path, config)
    columns = [_column(key, path, frame, which, config) for which in ("text", "label")]
    if frame.empty:
        raise ValueError(f"{key} = {name!r}: the file has no rows.")
    cells = frame[columns]
    empty = cells.isna() | cells.map(lambda cell: not str(cell).strip())
    bad = empty.any(axis=1).to_numpy().nonzero()[0]
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError(
            f"{key} = {name!r}: its rows have more fields than its header names columns; put texts that hold the "
            "separator in quotes (csv), or use jsonl."
        )
    if len(bad):
        raise ValueError(
            f"{key} = {name!r}: {len(bad)} rows have no text or no label, the first is row {bad[0]} (from 0, without "
            "the header); remove or complete them."
        )
    return [str(text) for text in frame[columns[0]]], [_label(value) for value in frame[columns[1]]]


def _label(value: Any) -> str:
    """Return a label as text; 1.0 from a column that a reader took for numbers is 1."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _frame(key: str, path: Path, config: DataConfig) -> pd.DataFrame:
    kind = path.suffix.lower().lstrip(".")
    try:
        if kind in ("csv", "tsv"):
            # Text stays as it is: "NA", "null" or "1.0" are data, and quotes in tsv are not syntax.
            return pd.read_csv(
                path,
                sep="," if kind == "csv" else "\t",
                quoting=0 if kind == "csv" else 3,
                header=0 if config.header else None,
                dtype=str,
                keep_default_na=False,
                na_filter=False,
                encoding="utf-8",
            )
        if kind == "jsonl":
            return pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        if kind == "parquet":
            return pd.read_parquet(path)
    except Exception as error:  # the readers raise errors of many libraries
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{key} = {str(path)!r}: cannot be read as {kind} ({first}).") from error
    raise ValueError(f"{key} = {str(path)!r}: the name must end in .csv, .tsv, .jsonl or .parquet.")


def _column(key: str, path: Path, frame: pd.DataFrame, which: str, config: DataConfig) -> Any:
    """Return the label by which the frame knows the text or label column."""
    wanted = config.text_column if which == "text" else config.label_column
    if path.suffix.lower() in (".csv", ".tsv") and not config.header:
        number = {"text": 0, "label": 1}[wanted] if wanted in ("text", "label") else int(wanted)
        if number not in frame.columns:
            raise ValueError(
                f"data.{which}-column = {wanted!r}: {key} = {str(path)!r} has {len(frame.columns)} columns, "
                "counted from 0."
            )
        return number
    if wanted not in frame.columns:
        names = [str(column) for column in frame.columns]
        raise ValueError(
            f"data.{which}-column = {wanted!r}: no such column in {key} = {str(path)!r}.{closest(wanted, names)} "
            f"Its columns: {', '.join(names[:20])}. (A file without a header line needs data.header = false.)"
        )
    return wanted
