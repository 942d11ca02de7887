"""Several runs side by side, as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.table import Table as RichTable

from fedlora.reports.format import human_bytes, human_time, number
from fedlora.reports.paired import beside_the_best, paired_differences, paired_lines
from fedlora.reports.run import Run


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
    metrics = sorted({run.measure.name for run in runs})
    if len(metrics) > 1:
        raise ValueError(f"runs that report {' and '.join(metrics)} cannot be compared; name runs of one task.")
    metric, keys = metrics[0], differing(runs)
    columns = ["run", *keys, "measured on", metric, "best round", "rounds", "up", "down", "time"]
    higher = bool(runs[0].plan["higher_is_better"])
    rows = []
    for place, run in enumerate(runs):
        rounds, values = run.curve()
        best = (max if higher else min)(zip(values, rounds, strict=True))[1] if values else None
        rows.append(
            [
                run.path.name,
                *(str(values[place]) for values in keys.values()),
                run.outcome.population.label,
                number(run.value(run.outcome)) if run.result else "did not finish",
                "-" if best is None else str(best),
                str(len(run.metrics)),
                human_bytes(sum(line["bytes_up"] for line in run.metrics)),
                human_bytes(sum(line["bytes_down"] for line in run.metrics)),
                human_time(sum(line["seconds"] for line in run.metrics)),
            ]
        )
    return columns, rows


def paired_comparison(runs: list[Run]) -> list[str]:
    """Return Markdown lines of what runs that differ in their seeds come to, pair by pair; nothing where none do."""
    keys = differing(runs)
    # Under DP these follow from others, or from the partition, where a run leaves them open.
    settled = {"privacy.client-size", "privacy.delta"}
    if all(run.config.privacy.epsilon for run in runs if run.config.privacy.mode == "dp"):
        settled.add("privacy.noise-multiplier")
    own = [key for key in keys if key not in {"seed", *settled}]
    if "seed" not in keys or not own or len({(run.outcome.key) for run in runs}) > 1:
        return []
    measure, higher = runs[0].outcome, bool(runs[0].plan["higher_is_better"])
    values = {measure.key: [run.value(measure) if run.result else None for run in runs]}
    title = f"{measure.label} beside the best, seed by seed"
    try:
        differences = paired_differences(pd.DataFrame({**keys, **values}), own, measure.key)
    except ValueError as error:
        return ["", f"{title}: {error}"]
    if (differences["n"] < 2).all():
        return []
    return ["", title, *paired_lines(beside_the_best(differences, higher))]


def comparison_table(runs: list[Run]) -> RichTable:
    """Return the comparison for the terminal."""
    columns, rows = comparison(runs)
    table = RichTable(title=f"{len(runs)} runs")
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        table.add_row(*row)
    return table
