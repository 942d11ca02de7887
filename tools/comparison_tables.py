"""Makes the tables of ``docs/comparison.md`` and ``comparison_details.md`` from the results of ``simulations/sweeps/``.

``benchmarks/results/NAME.csv`` is the ``groups.csv`` of the sweep of that name, without timings, and
``benchmarks/results/comparison/NAME.csv`` holds the final cells of ``comparison.toml`` and ``comparison-dp.toml`` on
two data sets, by partition (``split``). ``make tables`` runs this.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedlora.reports.format import human_bytes
from fedlora.reports.paired import beside_the_best, paired_cells, paired_differences
from tools.markdown import Table, rewrite

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_TARGETS = {"text": 0.65, "sst2": 0.8, "text-dp": 0.4, "sst2-dp": 0.7}  # eval.target of each sweep
_SPLITS = ("IID", "Dirichlet 0.5", "Dirichlet 0.1")
_SHORT = {"text": "text", "sst2": "SST-2", "text-dp": "text DP", "sst2-dp": "SST-2 DP"}
_BESIDE = "fedavg"
_KEYS = {"strategy.name": "strategy", "train.learning-rate": "learning rate", "data.alpha": "Dirichlet"}


def table(name: str, measure: str, where: str = "") -> list[str]:
    """Return a sweep's groups as Markdown lines.

    Args:
        name: The sweep.
        measure: What is shown, such as ``test_accuracy``; groups without it are left out.
        where: Which groups, as a query of pandas.
    """
    groups = _groups(name, where)
    groups = groups[groups[f"{measure}_mean"].notna()]
    keys = [str(key) for key in groups.columns[: groups.columns.get_loc("n")]]
    keys = [key for key in keys if key not in where]
    named = [_KEYS.get(key, f"`{key}`") for key in keys]
    columns = [*named, measure.replace("_", " "), "trained parameters", "sent by clients", "sent until 0.84"]
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(named) + " ---: |" * 4]
    for row in groups.to_dict("records"):
        cells = [_key(row[key]) for key in keys]
        cells.append(_spread(row, measure))
        cells += [f"{row['trained_parameters_mean']:,.0f}", human_bytes(row["bytes_up_mean"]), _until(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def dp_table() -> list[str]:
    """Return test accuracy by strategy, a column for each guarantee and each of its parts, as Markdown lines."""
    columns = {
        guarantee: _groups(name, where).set_index("strategy.name").to_dict("index")
        for guarantee, (name, where) in _GUARANTEES.items()
    }
    lines = [f"| strategy | trained parameters | {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for strategy, first in next(iter(columns.values())).items():
        rows = [column[strategy] for column in columns.values()]
        cells = [f"{_spread(row, 'test_accuracy')} (`{row['train.learning-rate']:g}`)" for row in rows]
        lines.append(f"| {_key(strategy)} | {first['trained_parameters_mean']:,.0f} | {' | '.join(cells)} |")
    return lines


def paired_table(name: str, measure: str, split: str) -> list[str]:
    """Return strategies beside the best one, seed by seed, as Markdown lines, the best first.

    Args:
        name: The results.
        measure: Such as ``test_accuracy``; strategies without it are left out.
        split: The partition.
    """
    cells, differences = _compared(name, measure, split)
    target = _TARGETS[name] if measure == "test_accuracy" else None
    columns = ["strategy", "learning rate", measure.replace("_", " "), "less the best", "95 % interval", "verdict"]
    columns += ["sent by clients", *([f"until {target}: seeds, rounds, sent, received"] if target else [])]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- | ---: | ---: | ---: | --- |" + " ---: |" * (len(columns) - 6)]
    for strategy, rows, beside in ranked(cells, differences, "strategy", measure):
        line = [_key(strategy), _rate(rows.iloc[0]), *beside, human_bytes(rows["bytes_up"].mean())]
        line += [_reached(rows)] if target else []
        lines.append(f"| {' | '.join(line)} |")
    return lines


def overview(measure: str) -> list[str]:
    """Return every strategy less ``fedavg``, seed by seed, in points, a column for each table, as Markdown lines.

    Args:
        measure: Such as ``test_accuracy``; strategies without it are left out.
    """
    compared = {(name, split): _compared(name, measure, split) for name in _TARGETS for split in _SPLITS}
    tables = {where: cells for where, (cells, _) in compared.items()}
    found = {where: _beside(differences) for where, (_, differences) in compared.items()}
    up = pd.DataFrame([cells.groupby("strategy")["bytes_up"].mean() for cells in tables.values()])
    sent = up.div(up[_BESIDE], axis=0).mean()  # of the tables that have a strategy
    means = {str(name): float(np.mean([of[name][0] for of in found.values() if name in of])) for name in sent.index}
    columns = ["strategy", *(f"{_SHORT[name]} {split.removeprefix('Dirichlet ')}" for name, split in tables)]
    server = _server_ms()
    columns += ["sent", "server, ms"]
    lines = [f"| {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(tables) + 2)]
    for strategy in sorted(means, key=lambda name: (name != _BESIDE, -means[name])):
        cells = [_points(*of[strategy]) if strategy in of else "" for of in found.values()]
        if strategy == _BESIDE:
            cells = [
                f"{rows.loc[rows['strategy'] == _BESIDE, measure].mean():.3f}".lstrip("0") for rows in tables.values()
            ]
        cells += [f"{sent[strategy]:.2f}", f"{server[strategy]:.0f}"]
        lines.append(f"| {' | '.join([_key(strategy), *cells])} |")
    return lines


def _server_ms() -> dict[str, float]:
    """Return what the server took for a round of each strategy, in milliseconds."""
    lines = json.loads((RESULTS / "server-time.json").read_text(encoding="utf-8"))["lines"]
    return {line["strategy"]: line["ms"] for line in lines}


@functools.cache  # a table by itself and the overview take the same
def _compared(name: str, measure: str, split: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the final cells of a partition that have a measure, and the differences of their strategies."""
    cells = pd.read_csv(RESULTS / "comparison" / f"{name}.csv").dropna(subset=[measure])
    cells = cells[cells["split"] == split]
    return cells, paired_differences(cells, ["strategy"], measure)


def _beside(differences: pd.DataFrame) -> dict[str, tuple[float, bool]]:
    """Return each strategy less ``fedavg``, and whether the two are told apart among all pairs of the table."""
    found = {_BESIDE: (0.0, False)}
    for one, other, sign in (("one", "other", 1.0), ("other", "one", -1.0)):
        own = differences[differences[other] == _BESIDE]
        found |= {
            str(name): (sign * difference, bool(distinct))
            for name, difference, distinct in zip(own[one], own["difference"], own["distinct"], strict=True)
        }
    return found


def _points(difference: float, distinct: bool) -> str:
    """Return a difference in points, in bold where it is told apart."""
    points = f"{100 * difference:+.1f}"
    return f"**{points}**" if distinct else points


def ranked(
    cells: pd.DataFrame, differences: pd.DataFrame, key: str, measure: str
) -> Iterator[tuple[str, pd.DataFrame, list[str]]]:
    """Yield what is compared, the best first: its name, its cells, and mean, distance from the best and verdict."""
    best = beside_the_best(differences, higher_is_better=True)
    beside = {str(row["one"]): paired_cells(row) for _, row in best.iterrows()}
    groups = {str(name): rows for name, rows in cells.groupby(key)}
    for name, rows in sorted(groups.items(), key=lambda item: -item[1][measure].mean()):
        spread = f"{rows[measure].mean():.4f} ± {rows[measure].std():.4f}"
        yield name, rows, [spread, *beside.get(name, ["", "", "the best on average"])]


def _rate(row: pd.Series[Any]) -> str:
    """Return the learning rate of clients, and that of the server where one was chosen."""
    server = "" if pd.isna(row["server_rate"]) else f", server `{row['server_rate']:g}`"
    return _key(f"{row['rate']:g}") + server


def _reached(rows: pd.DataFrame) -> str:
    """Return in how many seeds the target was reached, and the rounds and bytes until then, in the median."""
    reached = rows[rows["rounds_to_target"].notna()]
    if reached.empty:
        return "never"
    up, down = (human_bytes(reached[f"bytes_{way}_to_target"].median()) for way in ("up", "down"))
    return f"{len(reached)} of {len(rows)}, {reached['rounds_to_target'].median():.0f}, {up}, {down}"


def _groups(name: str, where: str) -> pd.DataFrame:
    groups = pd.read_csv(RESULTS / f"{name}.csv")
    return groups.query(where) if where else groups


def _spread(row: dict[Any, Any], measure: str) -> str:
    return f"{row[f'{measure}_mean']:.4f} ± {row[f'{measure}_std']:.4f}"


def _key(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _until(row: dict[Any, Any]) -> str:
    """Return the bytes until the target was reached, and in how many runs it was where not in all."""
    if pd.isna(row.get("bytes_up_to_target_mean")):
        return "never"
    reached = row.get("bytes_up_to_target_n", float("nan"))
    count = "" if pd.isna(reached) or reached == row["n"] else f" ({reached:.0f} of {row['n']:.0f})"
    return human_bytes(row["bytes_up_to_target_mean"]) + count


_GUARANTEES = {
    "without privacy, AdamW": ("sst2-dp-adamw", ""),
    "without privacy, SGD": ("sst2-dp-none", ""),
    "clip only": ("sst2-dp-clip", ""),
    "noise only": ("sst2-dp-noise", ""),
    "epsilon 8": ("sst2-dp", "`privacy.epsilon` == 8"),
    "epsilon 3": ("sst2-dp", "`privacy.epsilon` == 3"),
}
_MEASURES = ("test_accuracy", "clients_accuracy")
_SWEEPS = ("sst2-lora", "sst2-mos", "sst2-s2")
OVERVIEW: dict[str, Table] = {f"all {measure}": functools.partial(overview, measure) for measure in _MEASURES}
DETAILS: dict[str, Table] = {
    **{
        f"paired {name} {measure} {split}": functools.partial(paired_table, name, measure, split)
        for name in _TARGETS
        for split in _SPLITS
        for measure in _MEASURES
    },
    **{
        f"{name} {measure} {alpha}": functools.partial(table, name, measure, f"`data.alpha` == {alpha}")
        for name in _SWEEPS
        for measure in ("test_accuracy", "personal_accuracy")
        for alpha in (0.5, 0.1)
    },
    **{name: functools.partial(table, name, "dev_accuracy") for name in ("sst2-mos-devices", "sst2-mos-budget")},
    **{name: functools.partial(table, name, "dev_accuracy") for name in ("sst2-s2-rank", "sst2-s2-scale", "sst2-head")},
    "sst2-dp": dp_table,
}


def main(root: str) -> None:
    """Rewrite the tables of the project in the folder ``root``."""
    docs = Path(root) / "docs"
    rewrite(docs / "comparison.md", OVERVIEW)
    rewrite(docs / "comparison_details.md", DETAILS)


if __name__ == "__main__":
    main(sys.argv[1])
