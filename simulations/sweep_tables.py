"""A sweep's outcome as tables: for the terminal, and as ``summary.md`` in its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table as RichTable

from fedlora.privacy import conditions
from fedlora.reports.format import human_bytes, number
from fedlora.runs.privacy import format_epsilon
from fedlora.tasks import TASKS

if TYPE_CHECKING:
    from simulations.sweep import Sweep

Row = dict[str, Any]


def _groups(sweep: Sweep) -> tuple[list[str], list[str], list[Row]]:
    """Return the keys that distinguish groups, the measures they have, and what is known of each of them."""
    measure = TASKS[sweep.first.task].measure.name
    groups = pd.read_parquet(sweep.folder / "groups.parquet")
    measures = [
        name for name in (f"test_{measure}", f"personal_{measure}", f"dev_{measure}") if f"{name}_mean" in groups
    ]
    keys = [key for key in (*sweep.grid, *sweep.tune) if key != "seed"]
    rows = [{str(name): value for name, value in row.items() if not pd.isna(value)} for _, row in groups.iterrows()]
    return keys, measures, rows


def _spread(row: Row, name: str) -> str:
    """Return mean and standard deviation, or the mean alone of a single cell."""
    deviation = row.get(f"{name}_std")
    return number(row.get(f"{name}_mean")) + ("" if deviation is None else f" ± {deviation:.4f}")


def _epsilon(row: Row) -> str:
    """Return the mean epsilon; infinite where that of a run is, which a mean leaves out, as JSON has no such number."""
    if "delta_mean" not in row:
        return "-"  # of runs without DP
    known = row.get("epsilon_n", row["n"]) if "epsilon_mean" in row else 0
    return format_epsilon(row["epsilon_mean"] if known == row["n"] else None)


def _conditions(sweep: Sweep) -> list[str]:
    """Return what the sweep's epsilons mean nothing without, a line for each kind of them."""
    told: dict[str, str] = {}
    for config, varied in ((cell.config, cell.varied) for cell in sweep.cells()):
        if config.privacy.mode == "dp":
            where = [f"`{key}` = `{varied[key]}`" for key in ("privacy.accountant", "privacy.seed") if key in varied]
            told.setdefault(conditions(config), f" with {' and '.join(where)}" if where else "")
    return [f"Epsilon{where} is that of the client that spent most, {line}" for line, where in told.items()]


def terminal_table(sweep: Sweep) -> RichTable:
    """Return the groups with their measures."""
    keys, measures, rows = _groups(sweep)
    table = RichTable(title=f"{sweep.base['run.name']}: mean and standard deviation over seeds")
    for key in keys:
        table.add_column(key.replace(".", "\n"), no_wrap=True)
    for column in ("n", *(name.replace("_", "\n") for name in measures)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(row.get(key, "-")) for key in keys), str(row["n"]), *(_spread(row, m) for m in measures))
    return table


def summary(sweep: Sweep) -> str:
    """Return ``summary.md``: the groups with their measures, what they train, and what their clients send."""
    keys, measures, rows = _groups(sweep)
    target = sweep.first.eval.target
    columns = [*keys, "n", *(name.replace("_", " ") for name in measures), "trained parameters", "sent by clients"]
    private = _conditions(sweep)
    columns += ["epsilon", "delta"] if private else []
    columns += [f"rounds to {target:g}", "sent until then"] if target else []
    lines = [
        f"# {sweep.base['run.name']}",
        "",
        f"Mean ± standard deviation over n runs; {sweep.base['rounds']} rounds; bytes are those of all clients.",
        *private,
        *(f"`{key}` was chosen on dev rows among {', '.join(map(str, tried))}." for key, tried in sweep.tune.items()),
        "",
        f"| {' | '.join(columns)} |",
        "|" + " --- |" * len(columns),
    ]
    for row in rows:
        cells = [f"`{row.get(key, '-')}`" for key in keys] + [str(row["n"]), *(_spread(row, name) for name in measures)]
        cells += [f"{row['trained_parameters_mean']:,.0f}", human_bytes(row["bytes_up_mean"])]
        cells += [_epsilon(row), f"{row['delta_mean']:g}" if "delta_mean" in row else "-"] if private else []
        if target:
            reached = row.get("rounds_to_target_n", row["n"]) if "rounds_to_target_mean" in row else 0
            told = f" ({reached} of {row['n']})" if reached != row["n"] else ""
            cells.append(f"{row['rounds_to_target_mean']:.1f}{told}" if reached else "never")
            cells.append(human_bytes(row["bytes_up_to_target_mean"]) if reached else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
