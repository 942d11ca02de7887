"""Several runs side by side: a table for the terminal, and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from rich.table import Table as RichTable

from fedlora.runs.privacy import spending_table
from fedlora.runs.report import (
    Run,
    draw_clients,
    draw_curves,
    draw_epsilon,
    draw_partition,
    draw_ranks,
    human_bytes,
    human_time,
    number,
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the configuration keys in which the runs differ, each with its value in every run."""
    flats = [run.config.to_flat() for run in runs]
    keys = [key for key in flats[0] if len({str(flat[key]) for flat in flats}) > 1]
    return {key: [flat[key] for flat in flats] for key in keys if not key.startswith("run.")}


def comparison(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table with a line a run.

    Raises:
        ValueError: The runs do not report the same number.
    """
    metrics = sorted({run.metric for run in runs})
    if len(metrics) > 1:
        raise ValueError(f"runs that report {' and '.join(metrics)} cannot be compared; name runs of one task.")
    metric, keys = metrics[0], differing(runs)
    columns = ["run", *keys, "measured on", metric, "best round", "rounds", "up", "down", "time"]
    higher = bool(runs[0].plan["higher_is_better"])
    rows = []
    for place, run in enumerate(runs):
        rounds, values = run.curve()
        best = (max if higher else min)(zip(values, rounds, strict=True))[1] if values else None
        result = run.result or {}
        where = "test" if f"test_{metric}" in result else run.measure.split("_", 1)[0]
        rows.append(
            [
                run.path.name,
                *(str(values[place]) for values in keys.values()),
                where,
                number(run.final) if run.result else "did not finish",
                "-" if best is None else str(best),
                str(len(run.metrics)),
                human_bytes(sum(line["bytes_up"] for line in run.metrics)),
                human_bytes(sum(line["bytes_down"] for line in run.metrics)),
                human_time(sum(line["seconds"] for line in run.metrics)),
            ]
        )
    return columns, rows


def comparison_table(runs: list[Run]) -> RichTable:
    """Return the comparison for the terminal."""
    columns, rows = comparison(runs)
    table = RichTable(title=f"{len(runs)} runs")
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def html_page(runs: list[Run]) -> str:
    """Return a page with the comparison, the curves, and each run's clients; pictures are inside."""
    columns, rows = comparison(runs)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>fedlora report</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{'Comparison of ' + str(len(runs)) + ' runs' if len(runs) > 1 else _escaped(runs[0].path.name)}</h1>",
        _table(columns, rows),
        _picture(draw_curves(runs), f"{runs[0].metric} by round"),
    ]
    for run in runs:
        parts.append(f"<h2>{_escaped(run.path.name)}</h2>")
        parts.append(f"<p>privacy: {_escaped(run.guarantee)}<br>folder: <code>{_escaped(str(run.path))}</code></p>")
        outcome = {**run.lines_of_comparison()}
        if outcome:
            parts.append(
                _table(["compared with", run.metric], [[name, number(value)] for name, value in outcome.items()])
            )
        if run.spent:
            parts.append(_picture(draw_epsilon(run), "epsilon by round"))
        if "released" in run.privacy:
            released = [[one["what"], one["guarantee"]] for one in run.privacy["released"]]
            parts.append(_table(["what left each client", "guarantee"], released))
        if "clients" in run.privacy:
            parts.append(_table(*spending_table(run.privacy)))
        if run.scores:
            parts.append(_picture(draw_clients(run), f"{run.metric} of each client"))
        if run.strengths:
            parts.append(_picture(draw_ranks(run), "strength of each layer's components"))
        parts.append(_picture(draw_partition(run), "rows and labels by client"))
        config = [[key, str(value)] for key, value in run.config.to_flat().items()]
        parts.append(f"<details><summary>configuration</summary>{_table(['key', 'value'], config)}</details>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(figure: Any, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{_escaped(title)}" src="data:image/png;base64,{data}"></p>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
