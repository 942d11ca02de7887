"""What ``python -m benchmarks.engine`` and the commands beside it have measured, as the tables of a page take it.

Each file of ``benchmarks/results/engine/`` is what one command wrote with ``--out``: its name is the name of the run in
the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "engine"
NONE_YET = ["Not measured yet."]
Line = dict[str, Any]


def results(table: str, folder: Path | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return what was measured for a table, by the names of its files in a folder, those of GPUs first."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder or RESULTS).glob("*.json"))
    }
    for name, whole in sorted(found.items(), key=lambda item: item[1]["machine"]["cuda"] is None):
        if whole["table"] == table:
            yield name, whole


def lines_of(*tables: str, folder: Path | None = None) -> list[Line]:
    """Return all measured lines, each with its shape, machine and share of the ceiling."""
    lines = []
    for table in tables:
        for name, whole in results(table, folder):
            top = max(whole["ceiling_tflops"])
            for line in whole["lines"]:
                own: Line = {"run": name, "shape": whole["arguments"]["shape"], "device": device(whole)}
                own |= {"gpu": whole["machine"]["cuda"] is not None, "dp": False, **line}
                if "ms" in line:
                    own["share"] = line["tflops"] / top
                lines.append(own)
    return lines


def device(whole: dict[str, Any]) -> str:
    """Return what a result was measured on, in short."""
    about = whole["machine"]
    if about["cuda"]:
        return str(about["device"]).removeprefix("NVIDIA ")
    return f"{about['device']} CPU, {about['threads']} thread{'s' * (about['threads'] > 1)}"


def table_of(columns: dict[str, str], rows: list[list[str]]) -> list[str]:
    """Return lines of Markdown.

    Args:
        columns: For each its alignment, ``<`` or ``>``.
        rows: Its cells.
    """
    if not rows:
        return NONE_YET
    marks = " | ".join("---" if side == "<" else "---:" for side in columns.values())
    return [f"| {' | '.join(columns)} |", f"| {marks} |", *(f"| {' | '.join(row)} |" for row in rows)]
