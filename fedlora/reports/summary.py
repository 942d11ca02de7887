"""A run's ``summary.md`` and its plots."""

from __future__ import annotations

from typing import Any

from fedlora.reports.figures import write_plot
from fedlora.reports.format import number
from fedlora.reports.losses import loss_line
from fedlora.reports.plots import draw_clients, draw_curves, draw_ranks, plot_partition
from fedlora.reports.privacy_plots import draw_clipping, draw_epsilon
from fedlora.reports.run import Run
from fedlora.reports.tables import outcome
from fedlora.runs.folder import RunFolder
from fedlora.runs.privacy import markdown
from fedlora.runs.ranks import effective_ranks


def write_report(run: Run) -> None:
    """Write the plots and ``summary.md`` into the run's folder.

    Raises:
        StorageError: They cannot be written.
    """
    plot_partition(run)
    if run.metrics:
        write_plot(draw_curves([run]), run.path / f"{run.measure.name}.png")
    if run.spent:
        write_plot(draw_epsilon(run), run.path / "epsilon.png")
        clipping = draw_clipping(run)
        if clipping is not None:
            write_plot(clipping, run.path / "clipping.png")
    if run.scores:
        write_plot(draw_clients(run), run.path / "clients.png")
    if run.strengths:
        write_plot(draw_ranks(run), run.path / "ranks.png")
    RunFolder(run.path).write_text("summary.md", summary(run))


def summary(run: Run) -> str:
    """Return ``summary.md``."""
    sections = [_header(run), _outcome(run), _rounds(run), _pictures(run)]
    return "\n".join(line for section in sections for line in section)


def _header(run: Run) -> list[str]:
    config = run.config
    state = "finished" if run.result else "did not finish"
    return [
        f"# {run.path.name}",
        "",
        f"Strategy `{config.strategy.name}`, method `{config.method.name}` (rank {config.method.rank}), "
        f"model `{config.model.name}`, data `{config.data.name}`, task `{config.task}`, "
        f"head policy `{run.plan['roles'].get('head', 'none')}`. Run {state}.",
        f"Privacy: {run.guarantee}",
        "",
    ]


def _outcome(run: Run) -> list[str]:
    if not run.result:
        return []
    values = {**outcome(run), **{run.label(key): value for key, value in run.result.items()}}
    return [*(f"- {words}: {_shown(value)}" for words, value in values.items()), ""]


def _shown(value: Any) -> str:
    return number(value) if value is None or isinstance(value, float) else str(value)


def _rounds(run: Run) -> list[str]:
    key = run.measure.key
    columns = [run.label(key, key), "clients ok", "refused", "bytes up", "bytes down", "seconds"]
    return [
        f"| round | {' | '.join(columns)} |",
        "|" + " --- |" * 7,
        *(
            f"| {line['round']} | {number(line[key])} | {line['clients_ok']} | {line['clients_refused']} | "
            f"{line['bytes_up']} | {line['bytes_down']} | {line['seconds']:.1f} |"
            for line in run.metrics
        ),
        "",
        *(f"- {loss_line(loss)}" for loss in run.losses),
        *([""] if run.losses else []),
    ]


def _pictures(run: Run) -> list[str]:
    """Return the plots, with the privacy record and the ranks where they belong."""
    name = run.measure.name
    lines = [f"![{name} by round]({name}.png)", ""] if run.metrics else []
    if run.spent:
        lines += ["![epsilon by round](epsilon.png)", ""]
        if (run.path / "clipping.png").is_file():
            lines += ["![clipped rows and signal to noise by round](clipping.png)", ""]
    lines += [*markdown(run.privacy), ""]
    if run.scores:
        lines += [f"![{name} of each client](clients.png)", ""]
    if strengths := run.strengths:
        lines += [
            "![strength of each layer's components](ranks.png)",
            "",
            "| layer | effective rank |",
            "| --- | --- |",
        ]
        ranks = zip(strengths, effective_ranks(strengths), strict=True)
        lines += [*(f"| {layer} | {rank:g} |" for layer, rank in ranks), ""]
    return [*lines, *(["![rows and labels by client](partition.png)", ""] if run.partition["counts"] else [])]
