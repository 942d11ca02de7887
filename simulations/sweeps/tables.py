"""A sweep's tables: ``results``, ``groups`` and ``pairs``, ``summary.md``, and those for the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable

from fedlora.metrics import OUTSIDE, Metric
from fedlora.privacy import conditions
from fedlora.reports.figures import write_plot
from fedlora.reports.format import human_bytes, number
from fedlora.reports.paired import beside_the_best, paired_differences, paired_lines, seeds_line
from fedlora.reports.privacy_plots import conditions_line, draw_utility
from fedlora.reports.run import Run
from fedlora.runs.privacy import format_epsilon
from fedlora.storage import write_whole
from fedlora.tasks import TASKS
from simulations.sweeps.cells import Values, measures
from simulations.sweeps.file import Sweep

Row = dict[str, Any]

_UTILITY = "utility.png"


def finish(sweep: Sweep, console: Console) -> None:
    """Write the tables and ``summary.md``, and print the outcome."""
    write_tables(sweep)
    _write_utility(sweep)
    write_whole(sweep.folder / "summary.md", summary(sweep).encode())
    console.print(terminal_table(sweep))
    for line in _compared(sweep):
        console.print(line, markup=False)
    for name, reason in sweep.errors().items():
        console.print(f"failed: {name}: {reason}", markup=False)
    console.print(f"sweep folder: {sweep.folder}", markup=False)


def _write_utility(sweep: Sweep) -> None:
    """Draw the measure by epsilon, a line a strategy, where a sweep varies these two, under the same conditions."""
    if sweep.cases or sweep.grid.keys() - {"seed"} != {"strategy.name", "privacy.epsilon"}:
        return
    done = [cell for cell in sweep.cells() if cell.stage == "final" and cell.outcome() is not None]
    private = [cell for cell in done if cell.config.privacy.mode == "dp"]
    conditions_of = {conditions_line(Run.read(cell.folder).config) for cell in private}
    if len(conditions_of) != 1 or any(not cell.config.privacy.epsilon for cell in private):
        return
    _, found, rows = _groups(sweep)
    write_plot(draw_utility(pd.DataFrame(rows), found[0].key, conditions_of.pop()), sweep.folder / _UTILITY)


def write_tables(sweep: Sweep) -> None:
    """Write ``results`` (a line a cell), ``groups`` (mean and spread over seeds) and ``pairs``, as parquet and csv."""
    results = results_of(sweep)
    _write_table(sweep.folder / "results", results)
    _write_table(sweep.folder / "groups", _grouped(sweep, results))
    pairs = pairs_of(sweep, results)
    if len(pairs):
        _write_table(sweep.folder / "pairs", pairs)
    else:  # of an earlier grid
        for suffix in (".parquet", ".csv"):
            (sweep.folder / "pairs").with_suffix(suffix).unlink(missing_ok=True)


def results_of(sweep: Sweep) -> pd.DataFrame:
    """Return a line a cell: what distinguishes it, its numbers, status, error and run folder."""
    rows, errors = [], sweep.errors()
    for cell in sweep.cells():
        outcome = cell.outcome()
        error = errors.get(cell.name, "")
        status = "ok" if outcome is not None else "failed" if error else "missing"
        varied = {key: cell.varied.get(key) for key in sweep.columns}
        numbers = {key: value for key, value in (outcome or {}).items() if isinstance(value, int | float)}
        rows.append(
            {"stage": cell.stage, **varied, "status": status, **numbers, "error": error, "folder": str(cell.folder)}
        )
    return pd.DataFrame(rows)


def _grouped(sweep: Sweep, results: pd.DataFrame) -> pd.DataFrame:
    """Return mean, standard deviation and number of the finished final cells of each group, for every number."""
    keys = [key for key in sweep.columns if key != "seed"]
    done = results[(results["stage"] == "final") & (results["status"] == "ok")]
    rows = []
    for _, group in done.groupby([done[key].astype(str) for key in keys], sort=False) if keys else [("", done)]:
        if group.empty:
            continue
        row: Values = {key: group[key].iloc[0] for key in keys} | {"n": len(group)}
        for name in group.columns:
            values = group[name].dropna()
            if name not in (*keys, "seed") and len(values) and pd.api.types.is_numeric_dtype(values):
                row |= {f"{name}_mean": values.mean(), f"{name}_std": values.std() if len(values) > 1 else math.nan}
                if len(values) < len(group):
                    row[f"{name}_n"] = len(values)  # the others have no such number
        rows.append(row)
    return pd.DataFrame(rows)


def pairs_of(sweep: Sweep, results: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of any two combinations, seed by seed, for each measure that cells have; one seed: none.

    Args:
        sweep: The sweep.
        results: Its cells, as :func:`results_of` returns them.
    """
    keys = [key for key in (*sweep.cases, *sweep.grid) if key != "seed"]
    done = results[results["stage"] == "final"]
    several = len(sweep.grid.get("seed", ())) > 1
    found = [metric.key for metric in measures(sweep.first) if metric.key in done and several]
    parts = [paired_differences(done, keys, name).assign(measure=name) for name in found]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def compared(sweep: Sweep) -> list[tuple[Metric, pd.DataFrame, str]]:
    """Return for each measure its differences and how many seeds one takes: a point, or a hundredth of a loss."""
    results, found = results_of(sweep), []
    pairs = pairs_of(sweep, results)
    for metric in measures(sweep.first) if len(pairs) else ():
        own = pairs[pairs["measure"] == metric.key]
        if (own["n"] > 1).any():
            share = TASKS[sweep.first.task].measure.higher_is_better
            final = results.loc[results["stage"] == "final", metric.key].astype(float)
            size = 0.01 if share else 0.01 * float(final[np.isfinite(final)].median())
            found.append((metric, own, seeds_line(own, size)))
    return found


def _compared(sweep: Sweep) -> list[str]:
    """Return what paired differences say, as Markdown lines; nothing where no two combinations share two seeds."""
    lines, higher = [], TASKS[sweep.first.task].measure.higher_is_better
    for metric, own, seeds in compared(sweep):
        title = f"## {metric.label.capitalize()} beside the best, seed by seed"
        lines += ["", title, *paired_lines(beside_the_best(own, higher)), *(["", seeds] if seeds else [])]
    return lines


def _write_table(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A column of mixed types, such as learning rates beside a missing one, is text to parquet.
    plain = table.convert_dtypes()
    write_whole(path.with_suffix(".parquet"), plain.to_parquet(index=False))
    write_whole(path.with_suffix(".csv"), plain.to_csv(index=False).encode())


def _groups(sweep: Sweep) -> tuple[list[str], list[Metric], list[Row]]:
    """Return the keys that distinguish groups, the metrics they have, and the numbers of each of them."""
    groups = pd.read_parquet(sweep.folder / "groups.parquet")
    found = [metric for metric in measures(sweep.first) if f"{metric.key}_mean" in groups]
    keys = [key for key in sweep.columns if key != "seed"]
    rows = [{str(name): value for name, value in row.items() if not pd.isna(value)} for _, row in groups.iterrows()]
    return keys, found, rows


def _label(metric: Metric, dp: bool) -> str:
    """Return a metric in words; where cells are under DP they say whether the guarantee does not cover it."""
    return f"{metric.label} ({OUTSIDE})" if dp and not metric.covered else metric.label


def _spread(row: Row, name: str) -> str:
    """Return mean and standard deviation, or the mean alone of a single cell."""
    deviation = row.get(f"{name}_std")
    return number(row.get(f"{name}_mean")) + ("" if deviation is None else f" ± {deviation:.4f}")


def _epsilon(row: Row) -> str:
    """Return the mean epsilon; infinite where that of a run is, which a mean leaves out, as JSON has no such number."""
    if "delta_mean" not in row:
        return "-"  # of runs without DP
    finite = row.get("epsilon_n", row["n"]) if "epsilon_mean" in row else 0
    return format_epsilon(row["epsilon_mean"] if finite == row["n"] else None)


def _conditions(sweep: Sweep) -> list[str]:
    """Return the conditions of the sweep's epsilons, a line for each kind of them."""
    kinds: dict[str, str] = {}
    for config, varied in ((cell.config, cell.varied) for cell in sweep.cells()):
        if config.privacy.mode == "dp":
            where = [f"`{key}` = `{varied[key]}`" for key in ("privacy.accountant", "privacy.seed") if key in varied]
            kinds.setdefault(conditions(config), f" with {' and '.join(where)}" if where else "")
    return [f"Epsilon{where} is that of the client that spent most, {line}" for line, where in kinds.items()]


def terminal_table(sweep: Sweep) -> RichTable:
    """Return the groups with their measures, for the terminal."""
    keys, metrics, rows = _groups(sweep)
    table = RichTable(title=f"{sweep.base['run.name']}: mean and standard deviation over seeds")
    for key in keys:
        table.add_column(key.replace(".", "\n"), no_wrap=True)
    for column in ("n", *(metric.label.replace(" ", "\n") for metric in metrics)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spreads = [_spread(row, metric.key) for metric in metrics]
        table.add_row(*(str(row.get(key, "-")) for key in keys), str(row["n"]), *spreads)
    return table


def _tried(sweep: Sweep, key: str) -> str:
    """Return the values that a hyper-parameter was chosen among, those of cases with their own, too."""
    own = {case.name: case.tune[key] for cases in sweep.cases.values() for case in cases if key in case.tune}
    words = [
        ", ".join(map(str, sweep.tune[key])),
        *(f"for `{name}` {', '.join(map(str, some))}" for name, some in own.items()),
    ]
    return "; ".join(words)


def _rounds(sweep: Sweep) -> str:
    """Return the rounds of all cells in words; nothing where they differ."""
    varied = "rounds" in sweep.grid or any("rounds" in case.values for cases in sweep.cases.values() for case in cases)
    return "" if varied else f"{sweep.base['rounds']} rounds; "


def summary(sweep: Sweep) -> str:
    """Return ``summary.md``: the groups with their measures, what they train, and what their clients send."""
    keys, metrics, rows = _groups(sweep)
    target, dp = sweep.first.eval.target, _conditions(sweep)
    columns = [*keys, "n", *(_label(metric, bool(dp)) for metric in metrics), "trained parameters", "sent by clients"]
    columns += ["epsilon", "delta"] if dp else []
    columns += [f"rounds to {target:g}", "sent until then"] if target else []
    lines = [
        f"# {sweep.base['run.name']}",
        "",
        f"Mean ± standard deviation over n runs; {_rounds(sweep)}bytes are those of all clients.",
        *dp,
        *(f"`{key}` was chosen on dev rows among {_tried(sweep, key)}." for key in sweep.tune),
        "",
        f"| {' | '.join(columns)} |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = [*(f"`{row.get(key, '-')}`" for key in keys), str(row["n"])]
        cells += [_spread(row, metric.key) for metric in metrics]
        cells += [f"{row['trained_parameters_mean']:,.0f}", human_bytes(row["bytes_up_mean"])]
        cells += [_epsilon(row), f"{row['delta_mean']:g}" if "delta_mean" in row else "-"] if dp else []
        if target:
            reached = row.get("rounds_to_target_n", row["n"]) if "rounds_to_target_mean" in row else 0
            count = f" ({reached} of {row['n']})" if reached != row["n"] else ""
            cells.append(f"{row['rounds_to_target_mean']:.1f}{count}" if reached else "never")
            cells.append(human_bytes(row["bytes_up_to_target_mean"]) if reached else "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines += _compared(sweep)
    if (sweep.folder / _UTILITY).is_file():
        lines += ["", f"![{metrics[0].label} by epsilon]({_UTILITY})"]
    return "\n".join(lines) + "\n"
