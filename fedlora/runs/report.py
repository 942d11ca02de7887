"""A run's tables, plots and summary, made from the files of its folder."""

from __future__ import annotations

import json
import math
import textwrap
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table as RichTable

from fedlora.config import Config, ConfigError, from_toml
from fedlora.plugins import schema
from fedlora.runs.folder import RunFolder, read_lines
from fedlora.runs.privacy import FILE as PRIVACY_FILE
from fedlora.runs.privacy import OUTSIDE, told_epsilon, told_in_markdown
from fedlora.runs.ranks import effective_ranks, read_strengths

_MANY = 200  # clients beyond which plots show their distribution and not each of them


@dataclass(frozen=True)
class Run:
    """A finished (or unfinished) run, read from its folder.

    Attributes:
        path: The folder.
        config: Its configuration.
        metrics: Lines of ``metrics.jsonl``.
        partition: ``partition.json``: classes, and label counts by client.
        plan: ``plan.json``: what is measured, roles, bytes.
        scores: Lines of ``scores.jsonl``: each client on its own rows; empty where that is not measured.
        privacy: ``privacy.json``: what left the clients, under which guarantee, and what it cost.
        result: ``result.json``, or None where the run did not finish.
    """

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    partition: dict[str, Any]
    plan: dict[str, Any]
    scores: list[dict[str, Any]]
    privacy: dict[str, Any]
    result: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            ValueError: It is not one.
        """

        def lines(name: str) -> list[dict[str, Any]]:
            return read_lines(path / name) if (path / name).is_file() else []

        try:
            config = schema().read(from_toml((path / "config.toml").read_text(encoding="utf-8")), foreign=True)
            partition = json.loads((path / "partition.json").read_text(encoding="utf-8"))
            plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
            told = path / PRIVACY_FILE
            privacy = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {"guarantee": "none"}
            done = path / "result.json"
            result = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
            return cls(path, config, lines("metrics.jsonl"), partition, plan, lines("scores.jsonl"), privacy, result)
        except (OSError, tomllib.TOMLDecodeError, json.JSONDecodeError, ConfigError) as error:
            raise ValueError(f"{path} is not a run folder that can be read: {error}") from error

    @cached_property
    def strengths(self) -> dict[str, NDArray[np.float64]]:
        """The strengths of each layer's components, [adapters, r]; empty where nothing was exported."""
        return read_strengths(self.path)

    @property
    def measure(self) -> str:
        """The number that this run reports each round, such as ``test_accuracy``."""
        return str(self.plan["measure"])

    @property
    def metric(self) -> str:
        """The measure without what it is measured on, such as ``accuracy``."""
        return self.measure.split("_", 1)[1]

    @property
    def loss(self) -> str:
        """The loss on the same rows, such as ``test_loss``."""
        return f"{self.measure.split('_', 1)[0]}_loss"

    @property
    def final(self) -> float | None:
        """The outcome: on the test rows where they were read at the end, else the last round's measure."""
        result = self.result or {}
        value = result.get(f"test_{self.metric}", result.get(self.measure))
        return None if value is None else float(value)

    def curve(self) -> tuple[list[int], list[float]]:
        """Return the rounds that were measured, and their measure."""
        points = [(line["round"], line[self.measure]) for line in self.metrics if line[self.measure] is not None]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def spent(self) -> list[tuple[int, float, float]]:
        """Rounds, and epsilon of the clients that spent the most and the least until then; empty without DP."""
        return [
            (line["round"], *(math.inf if line[name] is None else line[name] for name in ("epsilon", "epsilon_least")))
            for line in self.metrics
            if "epsilon" in line
        ]

    @property
    def guarantee(self) -> str:
        """What was promised about clients' rows, and which of a report's numbers are outside of it."""
        outside = (
            f" Numbers of clients' own rows, and of baselines, are {OUTSIDE}." if "clients" in self.privacy else ""
        )
        return f"{self.privacy['guarantee']}{outside}"

    def lines_of_comparison(self) -> dict[str, float]:
        """Return what gives the curve its meaning, by what it is called."""
        result = self.result or {}
        where = "test" if f"alone_test_{self.metric}" in result else "dev"
        found = {
            "before training": result.get(f"before_{self.metric}"),
            "always the commonest class": result.get("majority_share"),
            "each client alone, mean": result.get(f"alone_{where}_{self.metric}"),
            "each client alone, worst tenth": result.get(f"alone_{where}_{self.metric}_worst_tenth"),
            "all data in one place": result.get(f"central_{where}_{self.metric}"),
        }
        if self.measure.startswith("personal"):
            found = {
                "each client alone, mean": result.get(f"alone_clients_{self.metric}"),
                "each client alone, worst tenth": result.get(f"alone_clients_{self.metric}_worst_tenth"),
            }
        return {name: float(value) for name, value in found.items() if value is not None}


def human_bytes(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """Return a duration in the two largest units that it needs."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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
    measure = run.measure
    table = RichTable(
        title=f"{run.path.name}: {run.config.strategy.name}, head {run.plan['roles'].get('head', 'none')}"
    )
    for column in ("round", measure.replace("_", " "), "loss", "clients ok", "refused", "up", "down", "seconds"):
        table.add_column(column, justify="right")
    for line in run.metrics:
        table.add_row(
            str(line["round"]),
            number(line[measure]),
            number(line[run.loss]),
            str(line["clients_ok"]),
            str(line["clients_refused"]),
            human_bytes(line["bytes_up"]),
            human_bytes(line["bytes_down"]),
            f"{line['seconds']:.1f}",
        )
    return table


def outcome_table(run: Run) -> RichTable:
    """Return a table of what came of a run, and of what it is compared with."""
    table = RichTable(title="outcome", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in _outcome(run).items():
        table.add_row(name, number(value))
    if run.spent:
        table.add_row(
            f"epsilon of the client that spent most, delta {run.privacy['delta']:g}", told_epsilon(run.spent[-1][1])
        )
    if run.result:
        table.add_row("sent by clients in all", human_bytes(run.result["bytes_up"]))
        table.add_row("time", human_time(run.result["seconds"]))
    return table


def _outcome(run: Run) -> dict[str, float | None]:
    result, metric = run.result or {}, run.metric
    where = "test" if f"test_{metric}" in result else run.measure.split("_", 1)[0]
    rows: dict[str, float | None] = {f"{where} {metric}": run.final}
    if where == "test" and run.measure.startswith("dev"):
        rows[f"dev {metric}"] = result.get(run.measure)
    if f"clients_{metric}" in result:
        rows[f"{metric} on clients' own rows, mean"] = result[f"clients_{metric}"]
        rows[f"{metric} on clients' own rows, worst tenth"] = result[f"clients_{metric}_worst_tenth"]
    if result.get("zero_components"):
        rows["share of rank components that are zero"] = result["zero_components"]
        rows["effective rank of a layer, mean"] = result["effective_rank"]
    return {**rows, **run.lines_of_comparison()}


def number(value: float | None) -> str:
    """Return a number with four decimals, or four digits where those would be mostly zeros; a dash where none is."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4g}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def write_report(run: Run) -> None:
    """Write the plots and ``summary.md`` into the run's folder."""
    folder = RunFolder(run.path)
    plot_partition(run)
    if run.metrics:
        draw_curves([run]).savefig(run.path / f"{run.metric}.png", dpi=120)
    if run.spent:
        draw_epsilon(run).savefig(run.path / "epsilon.png", dpi=120)
    if run.scores:
        draw_clients(run).savefig(run.path / "clients.png", dpi=120)
    if run.strengths:
        draw_ranks(run).savefig(run.path / "ranks.png", dpi=120)
    folder.write_text("summary.md", summary(run))


def summary(run: Run) -> str:
    """Return ``summary.md``."""
    config, measure = run.config, run.measure
    state = "finished" if run.result else "did not finish"
    head = [
        f"# {run.path.name}",
        "",
        f"Strategy `{config.strategy.name}`, method `{config.method.name}` (rank {config.method.rank}), "
        f"model `{config.model.name}`, data `{config.data.name}`, task `{config.task}`, "
        f"head policy `{run.plan['roles'].get('head', 'none')}`. Run {state}.",
        f"Privacy: {run.guarantee}",
        "",
    ]
    if run.result:
        rest = {key.replace("_", " "): value for key, value in run.result.items()}
        head += [f"- {name}: {_shown(value)}" for name, value in {**_outcome(run), **rest}.items()] + [""]
    rows = [f"| round | {measure} | clients ok | refused | bytes up | bytes down | seconds |", "|" + " --- |" * 7]
    rows += [
        f"| {line['round']} | {number(line[measure])} | {line['clients_ok']} | {line['clients_refused']} | "
        f"{line['bytes_up']} | {line['bytes_down']} | {line['seconds']:.1f} |"
        for line in run.metrics
    ]
    plots = ["", f"![{run.metric} by round]({run.metric}.png)", ""] if run.metrics else [""]
    if run.spent:
        plots += ["![epsilon by round](epsilon.png)", ""]
    plots += [*told_in_markdown(run.privacy), ""]
    if run.scores:
        plots += [f"![{run.metric} of each client](clients.png)", ""]
    told = run.strengths
    if told:
        plots += [
            "![strength of each layer's components](ranks.png)",
            "",
            "| layer | effective rank |",
            "| --- | --- |",
        ]
        plots += [f"| {name} | {rank:g} |" for name, rank in zip(told, effective_ranks(told), strict=True)] + [""]
    return "\n".join(head + rows + plots + ["![rows and labels by client](partition.png)", ""])


def _shown(value: Any) -> str:
    return number(value) if value is None or isinstance(value, float) else str(value)


def draw_curves(runs: list[Run]) -> Any:
    """Return a figure of the measure by round, one line a run; of a single run with what it is compared with."""
    figure, axes = _figure()
    for run in runs:
        label = run.config.strategy.name if len(runs) == 1 else run.path.name
        axes.plot(*run.curve(), marker="o", label=_plain(label))
    if len(runs) == 1:
        styles = ("--", ":", "-.", (0, (1, 3)))
        for (name, value), style in zip(runs[0].lines_of_comparison().items(), styles, strict=False):
            axes.axhline(value, color="#777777", linestyle=style, label=name)
    axes.set(xlabel="round", ylabel=runs[0].measure.replace("_", " "))
    if runs[0].metric == "accuracy":
        axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)  # matplotlib finds the emptiest corner
    return figure


def draw_epsilon(run: Run) -> Any:
    """Return a figure of epsilon by round: of the clients that spent the most and the least, with the budget."""
    figure, axes = _figure()
    rounds, most, least = zip(*run.spent, strict=True)
    axes.plot(rounds, most, marker="o", label="the client that spent most")
    if most != least:
        axes.plot(rounds, least, marker=".", label="the client that spent least")
    if run.config.privacy.epsilon:
        axes.axhline(run.config.privacy.epsilon, color="#777777", linestyle="--", label="budget")
    axes.set(xlabel="round", ylabel=f"epsilon at delta {run.privacy['delta']:g}")
    axes.set_title(_plain(textwrap.fill(run.privacy["guarantee"], 120)), fontsize=5)
    axes.set_ylim(0, None)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_clients(run: Run) -> Any:
    """Return a figure of each client's measure on its own rows, from the worst to the best."""
    figure, axes = _figure()
    alone = run.path / "baselines" / "alone" / "scores.jsonl"
    series = {run.config.strategy.name: run.scores}
    if alone.is_file():
        series["each client alone"] = read_lines(alone)
    for name, scores in series.items():
        values = sorted(score[run.metric] for score in scores if score[run.metric] is not None)
        axes.plot(np.linspace(0, 100, len(values)), values, marker="." if len(values) <= _MANY else "", label=name)
    axes.set(xlabel="clients, sorted (percent)", ylabel=f"{run.metric} on own rows")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_ranks(run: Run) -> Any:
    """Return a figure of the strengths of each layer's rank-one components, sorted; white is exactly zero.

    Where clients have adapters of their own, of the mean over them.
    """
    told = run.strengths
    figure, axes = _figure()
    width = max(values.shape[1] for values in told.values())
    grid = np.zeros((len(told), width))
    for row, values in enumerate(told.values()):
        grid[row, : values.shape[1]] = np.sort(values.mean(0))[::-1]
    image = axes.imshow(np.ma.masked_equal(grid, 0.0), aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="Frobenius norm")
    if len(told) <= 40:
        axes.set_yticks(range(len(told)), [_plain(_short(name)) for name in told], fontsize=6)
    axes.set(xlabel="component, strongest first", ylabel="adapted layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _short(name: str) -> str:
    """Return a layer's name without what all names begin with: from its number on."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] :]) if numbers else name


def plot_partition(run: Run) -> None:
    """Draw each client's rows, stacked by label, into ``partition.png``."""
    draw_partition(run).savefig(run.path / "partition.png", dpi=120)


def draw_partition(run: Run) -> Any:
    """Return a figure of each client's rows by label; of many clients sorted by size."""
    figure, axes = _figure()
    counts = np.asarray(run.partition["counts"])
    names = [_plain(name) if label < 20 else None for label, name in enumerate(run.partition["classes"])]
    if len(counts) > _MANY:
        ordered = counts[np.argsort(-counts.sum(1), kind="stable")]
        axes.stackplot(np.arange(len(ordered)), ordered.T, labels=[name or "" for name in names])
    else:
        bottom = np.zeros(len(counts))
        for label, name in enumerate(names):
            axes.bar(np.arange(len(counts)), counts[:, label], bottom=bottom, label=name, width=0.9)
            bottom += counts[:, label]
    axes.set(xlabel="client" + (", largest first" if len(counts) > _MANY else ""), ylabel="training rows")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _plain(name: str) -> str:
    """Return a name as text: matplotlib reads $...$ as mathematics and leaves out names that begin with _."""
    return f" {name}".replace("$", r"\$")


def _figure() -> tuple[Any, Any]:
    """Return a figure that needs no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
