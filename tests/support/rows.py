"""Files of texts and labels in every format that is read, and the configuration that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from fedlora.config import Config, DataConfig

ROWS = [
    ("one fine film", "good"),
    ('a "quoted", odd one', "bad"),
    ("NA", "good"),
    ("null", "bad"),
    ("naïve café", "good"),
] * 4


def write(path: Path, rows: list[tuple[str, Any]] = ROWS, header: bool = True) -> str:
    frame = pd.DataFrame(rows, columns=["review", "verdict"])
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False, header=header)
        case ".tsv":
            lines = (["review\tverdict"] if header else []) + [f"{text}\t{label}" for text, label in rows]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps({"review": t, "verdict": v}) + "\n" for t, v in rows), encoding="utf-8")
        case ".parquet":
            frame.to_parquet(path)
    return str(path)


def config(path: str, seed: int = 0, **changes: Any) -> Config:
    data = {"name": "file", "path": path, "text_column": "review", "label_column": "verdict", **changes}
    return Config(seed=seed, data=DataConfig(**data))
