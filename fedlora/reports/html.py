"""Runs as one HTML page that needs nothing beside it: comparison, curves, and what each run came to."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from fedlora.reports.comparison import comparison
from fedlora.reports.format import number
from fedlora.reports.plots import draw_clients, draw_curves, draw_epsilon, draw_partition, draw_ranks
from fedlora.reports.run import Run
from fedlora.runs.privacy import spending_table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
code { background: #f4f4f4; padding: 0 .2rem; }
"""


def html_page(runs: list[Run]) -> str:
    """Return a page with the comparison, the curves, and each run's clients; pictures are inside."""
    columns, rows = comparison(runs)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>fedlora report</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{'Comparison of ' + str(len(runs)) + ' runs' if len(runs) > 1 else _escaped(runs[0].path.name)}</h1>",
        _table(columns, rows),
        _picture(draw_curves(runs), f"{runs[0].measure.name} by round"),
    ]
    for run in runs:
        parts.append(f"<h2>{_escaped(run.path.name)}</h2>")
        parts.append(f"<p>privacy: {_escaped(run.guarantee)}<br>folder: <code>{_escaped(str(run.path))}</code></p>")
        references = [[words, number(value)] for words, value in run.references().items()]
        if references:
            parts.append(_table(["compared with", run.measure.name], references))
        if run.spent:
            parts.append(_picture(draw_epsilon(run), "epsilon by round"))
        if "released" in run.privacy:
            released = [[one["what"], one["guarantee"]] for one in run.privacy["released"]]
            parts.append(_table(["what left each client", "guarantee"], released))
        if "clients" in run.privacy:
            parts.append(_table(*spending_table(run.privacy)))
        if run.scores:
            parts.append(_picture(draw_clients(run), f"{run.measure.name} of each client"))
        if run.strengths:
            parts.append(_picture(draw_ranks(run), "strength of each layer's components"))
        if run.partition["counts"]:
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
