"""Runs as one HTML page that needs nothing beside it: comparison, curves, and what each run came to."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from typing import Any

from fedlora.reports.comparison import comparison
from fedlora.reports.format import number
from fedlora.reports.page import SCRIPT, STYLE
from fedlora.reports.plots import draw_clients, draw_curves, draw_partition, draw_ranks
from fedlora.reports.privacy_plots import draw_clipping, draw_epsilon
from fedlora.reports.run import Run
from fedlora.reports.tables import outcome, rounds_table
from fedlora.runs.privacy import spending_table


def html_page(runs: list[Run]) -> str:
    """Return a page with the comparison, the curves, and each run's clients; pictures, style and script are inside."""
    columns, rows = comparison(runs)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>fedlora report</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>{'Comparison of ' + str(len(runs)) + ' runs' if len(runs) > 1 else _escaped(runs[0].path.name)}</h1>",
        _table(columns, rows),
    ]
    if len(runs) > 1:
        parts.append(_picture(draw_curves(runs), f"{runs[0].measure.name} by round"))
    for run in runs:
        parts.append(f"<section><h2>{_escaped(run.path.name)}</h2>")
        parts.append(f"<p>privacy: {_escaped(run.guarantee)}<br>folder: <code>{_escaped(str(run.path))}</code></p>")
        parts.append(f'<div class="columns">{"".join(_parts(run))}</div></section>')
    return "\n".join([*parts, f"<script>{SCRIPT}</script></body></html>"]) + "\n"


def _parts(run: Run) -> Iterator[str]:
    """Yield what is said of one run: pictures and tables, side by side where there is room."""
    yield _picture(draw_curves([run]), f"{run.measure.name} by round")
    references = run.references()
    came_to = {words: value for words, value in outcome(run).items() if words not in references}
    tables = [_table(["outcome", "value"], [[words, number(value)] for words, value in came_to.items()])]
    if references:
        rows = [[words, number(value)] for words, value in references.items()]
        tables.append(_table(["compared with", run.measure.name], rows))
    yield f"<div>{''.join(tables)}</div>"
    if run.spent:
        yield _picture(draw_epsilon(run), "epsilon by round")
        clipping = draw_clipping(run)
        if clipping is not None:
            yield _picture(clipping, "clipped rows and signal to noise by round")
    if "released" in run.privacy:
        released = [[one["what"], one["guarantee"]] for one in run.privacy["released"]]
        yield _table(["what left each client", "guarantee"], released)
    if "clients" in run.privacy:
        yield _table(*spending_table(run.privacy), wide=True)
    if run.scores:
        yield _picture(draw_clients(run), f"{run.measure.name} of each client")
    if run.strengths:
        yield _picture(draw_ranks(run), "strength of each layer's components")
    if run.partition["counts"]:
        yield _picture(draw_partition(run), "rows and labels by client")
    yield _details("rounds", _table(*rounds_table(run)))
    config = [[key, str(value)] for key, value in run.config.to_flat().items()]
    yield _details("configuration", _table(["key", "value"], config))


def _table(columns: list[str], rows: list[list[str]], *, wide: bool = False) -> str:
    head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="table{" wide" if wide else ""}">{table}</div>'


def _details(title: str, content: str) -> str:
    return f'<details class="wide"><summary>{title}</summary>{content}</details>'


def _picture(figure: Any, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{_escaped(title)}" src="data:image/png;base64,{data}"></p>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
