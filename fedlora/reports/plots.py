"""Plots of runs: curves, clients, ranks, partitions."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from fedlora.reports.figures import new_figure, plain_text, write_plot
from fedlora.reports.run import Run
from fedlora.runs.folder import read_lines

MANY = 200
"""Clients beyond which plots show their distribution and not each of them."""


def draw_curves(runs: list[Run]) -> Any:
    """Return a figure of the measure by round, one line a run; of a single run with what it is compared with."""
    figure, axes = new_figure()
    for run in runs:
        label = run.config.strategy.name if len(runs) == 1 else run.path.name
        axes.plot(*run.curve(), marker="o", label=plain_text(textwrap.fill(label, 40)))
    if len(runs) == 1:
        styles = ("--", ":", "-.", (0, (1, 3)))
        for (name, value), style in zip(runs[0].references().items(), styles, strict=False):
            axes.axhline(value, color="#777777", linestyle=style, label=name)
    axes.set(xlabel="round", ylabel=runs[0].label(runs[0].measure.key))
    if runs[0].measure.name == "accuracy":
        axes.set_ylim(0, 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8)  # matplotlib finds the emptiest corner
    return figure


def draw_clients(run: Run) -> Any:
    """Return a figure of each client's measure on its own rows, from the worst to the best."""
    figure, axes = new_figure()
    alone = run.path / "baselines" / "alone" / "scores.jsonl"
    series = {run.config.strategy.name: run.scores}
    if alone.is_file():
        series["each client alone"] = read_lines(alone)
    for name, scores in series.items():
        values = sorted(score[run.measure.name] for score in scores if score[run.measure.name] is not None)
        axes.plot(np.linspace(0, 100, len(values)), values, marker="." if len(values) <= MANY else "", label=name)
    axes.set(xlabel="clients, sorted (percent)", ylabel=f"{run.measure.name} on own rows")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_ranks(run: Run) -> Any:
    """Return a figure of the strengths of each layer's rank-one components, sorted; white is exactly zero.

    Where clients have adapters of their own, of the mean over them.
    """
    strengths = run.strengths
    figure, axes = new_figure()
    width = max(values.shape[1] for values in strengths.values())
    grid = np.zeros((len(strengths), width))
    for row, values in enumerate(strengths.values()):
        grid[row, : values.shape[1]] = np.sort(np.nanmean(values, axis=0))[::-1]
    image = axes.imshow(np.ma.masked_equal(grid, 0.0), aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="Frobenius norm")
    if len(strengths) <= 40:
        axes.set_yticks(range(len(strengths)), [plain_text(_short(name)) for name in strengths], fontsize=6)
    axes.set(xlabel="component, strongest first", ylabel="adapted layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _short(name: str) -> str:
    """Return a layer's name without what all names begin with: from its number on."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[0] :]) if numbers else name


def plot_partition(run: Run) -> None:
    """Draw each client's rows, stacked by label, into ``partition.png``; nothing where nobody knows them."""
    if run.partition["counts"]:
        write_plot(draw_partition(run), run.path / "partition.png")


def draw_partition(run: Run) -> Any:
    """Return a figure of each client's rows by label; of many clients sorted by size."""
    figure, axes = new_figure()
    counts = np.asarray(run.partition["counts"])
    names = [plain_text(name) if label < 20 else None for label, name in enumerate(run.partition["classes"])]
    if len(counts) > MANY:
        ordered = counts[np.argsort(-counts.sum(1), kind="stable")]
        axes.stackplot(np.arange(len(ordered)), ordered.T, labels=[name or "" for name in names])
    else:
        bottom = np.zeros(len(counts))
        for label, name in enumerate(names):
            axes.bar(np.arange(len(counts)), counts[:, label], bottom=bottom, label=name, width=0.9)
            bottom += counts[:, label]
    axes.set(xlabel="client" + (", largest first" if len(counts) > MANY else ""), ylabel="training rows")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
