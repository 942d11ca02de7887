"""Tables of a run for the terminal: clients, rounds, outcome."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table as RichTable

from fedlora.metrics import GENERATED, Metric, Population
from fedlora.reports.format import human_bytes, human_time, number
from fedlora.reports.run import Run
from fedlora.runs.privacy import format_epsilon


def clients_table(classes: list[str], counts: list[list[int]], limit: int = 20) -> RichTable:
    """Return a table of each client's rows and labels; of many clients the first and a count of the rest."""
    shown = classes[:10] if len(classes) > 1 else []
    table = RichTable(title=f"{len(counts)} clients, {int(np.sum(counts))} training rows")
    table.add_column("client", justify="right")
    table.add_column("rows", justify="right")
    for name in shown:
        table.add_column(escape(name), justify="right")
    for client, row in enumerate(counts[:limit]):
        table.add_row(str(client), str(sum(row)), *[str(count) for count in row[: len(shown)]])
    if len(counts) > limit:
        table.add_row("...", f"{len(counts) - limit} more")
    return table


def metrics_table(run: Run) -> RichTable:
    """Return a table with a line a round."""
    table = RichTable(
        title=f"{run.path.name}: {run.config.strategy.name}, head {run.plan['roles'].get('head', 'none')}"
    )
    columns, rows = rounds_table(run)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def rounds_table(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table with a line a round."""
    measure, loss = run.measure.key, run.loss.key
    columns = ["round", run.label(measure), "loss", "clients ok", "refused", "up", "down", "seconds"]
    rows = [
        [
            str(line["round"]),
            number(line[measure]),
            number(line[loss]),
            str(line["clients_ok"]),
            str(line["clients_refused"]),
            human_bytes(line["bytes_up"]),
            human_bytes(line["bytes_down"]),
            f"{line['seconds']:.1f}",
        ]
        for line in run.metrics
    ]
    return columns, rows


def outcome_table(run: Run) -> RichTable:
    """Return a table of what came of a run, and of what it is compared with."""
    table = RichTable(title="outcome", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in outcome(run).items():
        table.add_row(name, number(value))
    if run.spent:
        table.add_row(
            f"epsilon of the client that spent most, delta {run.privacy['delta']:g}", format_epsilon(run.spent[-1][1])
        )
    if run.result:
        table.add_row("sent by clients in all", human_bytes(run.result["bytes_up"]))
        table.add_row("time", human_time(run.result["seconds"]))
    return table


def outcome(run: Run) -> dict[str, float | None]:
    """Return what came of a run, and what that is compared with, by the words of each number."""
    name, result = run.measure.name, run.result or {}
    rows: dict[str, float | None] = {run.label(run.outcome.key): run.value(run.outcome)}
    if run.measure.population is Population.DEV and run.outcome != run.measure:
        rows[run.label(run.measure.key)] = run.value(run.measure)
    own = Metric(name, Population.CLIENTS)
    if own.key in result:
        rows |= _over_clients(run, own)
    for key in (Metric(one, population).key for population in Population for one in GENERATED[:2]):
        if key in result:
            rows[run.label(key)] = result[key]
    if result.get("zero_components"):
        rows["share of rank components that are zero"] = result["zero_components"]
        rows["effective rank of a layer, mean"] = result["effective_rank"]
    return {**rows, **run.references()}


def _over_clients(run: Run, own: Metric) -> Mapping[str, Any]:
    words = f"{own.name} on clients' own rows"
    statistics = {"mean": own, "worst tenth": own.worst_tenth}
    return {run.label(metric.key, f"{words}, {what}"): run.value(metric) for what, metric in statistics.items()}
