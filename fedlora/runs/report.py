"""A run's table, plots and summary, made from the files of its folder."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table as RichTable

from fedlora.config import Config, ConfigError, from_toml
from fedlora.runs.folder import RunFolder, read_lines


@dataclass(frozen=True)
class Run:
    """A finished (or unfinished) run, read from its folder.

    Attributes:
        path: The folder.
        config: Its configuration.
        metrics: Lines of ``metrics.jsonl``.
        partition: ``partition.json``: classes, and label counts by client.
        result: ``result.json``, or None where the run did not finish.
    """

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    partition: dict[str, Any]
    result: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            ValueError: It is not one.
        """
        try:
            config = Config.from_flat(from_toml((path / "config.toml").read_text(encoding="utf-8")))
            partition = json.loads((path / "partition.json").read_text(encoding="utf-8"))
            metrics = read_lines(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
            done = path / "result.json"
            result = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
        except (OSError, tomllib.TOMLDecodeError, json.JSONDecodeError, ConfigError) as error:
            raise ValueError(f"{path} is not a run folder that can be read: {error}") from error
        return cls(path, config, metrics, partition, result)

    @property
    def measure(self) -> str:
        """The accuracy that this run reports: the global model's, or the clients' own."""
        return self.config.method.measure


def human_bytes(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def clients_table(classes: list[str], counts: list[list[int]], limit: int = 20) -> RichTable:
    """Return a table of each client's rows and labels; of many clients the first and a count of the rest."""
    shown = classes[:10]
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
    measure = run.measure
    table = RichTable(title=f"{run.path.name}: {run.config.strategy.name}, head {run.config.method.head}")
    for column in ("round", measure.replace("_", " "), "loss", "clients ok", "refused", "up", "down", "seconds"):
        table.add_column(column, justify="right")
    for line in run.metrics:
        loss = line["personal_loss" if measure == "personal_accuracy" else "test_loss"]
        table.add_row(
            str(line["round"]),
            _number(line[measure]),
            _number(loss),
            str(line["clients_ok"]),
            str(line["clients_refused"]),
            human_bytes(line["bytes_up"]),
            human_bytes(line["bytes_down"]),
            f"{line['seconds']:.1f}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def write_report(run: Run) -> None:
    """Write the plots and ``summary.md`` into the run's folder."""
    folder = RunFolder(run.path)
    plot_partition(run)
    if run.metrics:
        plot_accuracy(run)
    folder.write_text("summary.md", summary(run))


def summary(run: Run) -> str:
    """Return ``summary.md``."""
    config, measure = run.config, run.measure
    state = "finished" if run.result else "did not finish"
    head = [
        f"# {run.path.name}",
        "",
        f"Strategy `{config.strategy.name}`, method `{config.method.name}` (rank {config.method.rank}), "
        f"model `{config.model.name}`, data `{config.data.name}`, head policy `{config.method.head}`. Run {state}.",
        "Privacy: none.",
        "",
    ]
    if run.result:
        head += [f"- {key.replace('_', ' ')}: {_shown(value)}" for key, value in run.result.items()] + [""]
    rows = [f"| round | {measure} | clients ok | refused | bytes up | bytes down | seconds |", "|" + " --- |" * 7]
    rows += [
        f"| {line['round']} | {_number(line[measure])} | {line['clients_ok']} | {line['clients_refused']} | "
        f"{line['bytes_up']} | {line['bytes_down']} | {line['seconds']:.1f} |"
        for line in run.metrics
    ]
    plots = ["", "![accuracy by round](accuracy.png)", ""] if run.metrics else [""]
    return "\n".join(head + rows + plots + ["![rows and labels by client](partition.png)", ""])


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def plot_accuracy(run: Run) -> None:
    """Draw accuracy by round into ``accuracy.png``."""
    figure, axes = _figure()
    points = [(line["round"], line[run.measure]) for line in run.metrics if line[run.measure] is not None]
    axes.plot(
        [x for x, _ in points], [y for _, y in points], marker="o", color="#1f5f8b", label=run.config.strategy.name
    )
    majority = (run.result or {}).get("majority_share")
    if majority is not None and run.measure == "test_accuracy":
        axes.axhline(majority, color="#999999", linestyle="--", label="always the commonest class")
    axes.set(xlabel="round", ylabel=run.measure.replace("_", " "), ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)  # matplotlib finds the emptiest corner
    figure.savefig(run.path / "accuracy.png", dpi=120)


def plot_partition(run: Run) -> None:
    """Draw each client's rows, stacked by label, into ``partition.png``."""
    figure, axes = _figure()
    counts = np.asarray(run.partition["counts"])
    bottom = np.zeros(len(counts))
    for label, name in enumerate(run.partition["classes"]):
        # matplotlib reads $...$ as mathematics and leaves out names that begin with an underscore
        name = f" {name}".replace("$", r"\$")
        axes.bar(np.arange(len(counts)), counts[:, label], bottom=bottom, label=name if label < 20 else None, width=0.9)
        bottom += counts[:, label]
    axes.set(xlabel="client", ylabel="training rows")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(run.path / "partition.png", dpi=120)


def _figure() -> tuple[Any, Any]:
    """Return a figure that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
