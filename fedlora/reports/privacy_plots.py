"""Figures of privacy budgets: utility, spending, noise, accountants, diagnostics, schedules, attacks, who sees what.

They take data frames or runs. Those that show an epsilon say its conditions below (:mod:`fedlora.reports.figures`).
"""

from __future__ import annotations

import math
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from fedlora.config import Config
from fedlora.metrics import OUTSIDE
from fedlora.privacy import conditions
from fedlora.reports.figures import (
    COLOURS,
    GREY,
    MARKS,
    SIZE,
    colour_of,
    draw_lines,
    few_ticks,
    foot,
    framed,
    label_ends,
    line_look,
    new_figure,
    plain_text,
    plain_ticks,
)
from fedlora.reports.frames import diagnostics_frame, spending_frame
from fedlora.reports.plots import MANY
from fedlora.reports.run import Run


def draw_utility(groups: pd.DataFrame, measure: str, condition: str, chance: float | None = None) -> Any:
    """Return a figure of a measure by epsilon, a line for each strategy; at the right edge without privacy.

    Args:
        groups: A sweep's groups over ``strategy.name`` and ``privacy.epsilon``, of which 0 is without privacy.
        measure: Such as ``test_accuracy``.
        condition: Of epsilon.
        chance: What is reached without training.
    """
    figure, axes = framed(condition)
    budgets = sorted(value for value in groups["privacy.epsilon"].astype(float).unique() if value > 0)
    free = budgets[-1] * 4.0  # where what has no epsilon stands
    ends = []
    for number, (name, own) in enumerate(groups.groupby("strategy.name", sort=False)):
        own = own.assign(epsilon=own["privacy.epsilon"].astype(float)).sort_values("epsilon")
        values, spread = own[f"{measure}_mean"], own.get(f"{measure}_std", pd.Series(np.nan, own.index)).fillna(0.0)
        x = own["epsilon"].where(own["epsilon"] > 0, free)
        private = own["epsilon"] > 0
        look = {**line_look(number), "markersize": 5, "capsize": 3}
        axes.errorbar(x[private], values[private], spread[private], **look)
        axes.errorbar(x[~private], values[~private], spread[~private], **{**look, "linestyle": "none"})
        last = values[~private].iloc[-1] if (~private).any() else values.iloc[-1]
        ends.append((float(last), str(name), colour_of(number)))
    if chance is not None:
        axes.axhline(chance, color=GREY, linewidth=1, linestyle=":")
        words = "the commonest\nclass"  # below what has no privacy, where points are far above it
        axes.text(free, chance, words, color=GREY, fontsize=SIZE - 2, ha="center", va="bottom")
    axes.set_xscale("log")
    axes.set_xticks([*budgets, free], [*(f"{value:g}" for value in budgets), "none"])
    axes.minorticks_off()
    axes.set_xlim(budgets[0] * 0.8, free * 1.15)
    axes.axvline(free / 2, color=GREY, linewidth=0.6)
    axes.set(xlabel="epsilon (none: without privacy)", ylabel=measure.replace("_", " "))
    label_ends(axes, ends)
    return figure


def draw_epsilon(run: Run) -> Any:
    """Return a figure of epsilon by round: of each client, or of those that have spent the most and the least.

    The latter of many clients, and where their ledgers are not in the run's folder, as in a deployment.
    """
    clients = run.privacy.get("clients", ())
    spending = spending_frame(run) if len(clients) <= MANY else pd.DataFrame()
    lost = sum("error" in one for one in clients)
    condition = conditions_line(run.config)
    if not spending.empty:
        condition += f" Without {lost} client(s) whose ledgers cannot be trusted." if lost else ""
        return draw_spending(spending, run.config.privacy.epsilon, condition)
    ends = [(name, line[0], line[at]) for name, at in (("most spent", 1), ("least spent", 2)) for line in run.spent]
    spending = pd.DataFrame(ends, columns=["client", "round", "epsilon"]).assign(stopped=False)
    figure = draw_spending(spending, run.config.privacy.epsilon, condition)
    names = sorted(set(spending["client"]))  # the order in which they are drawn
    last = spending[np.isfinite(spending["epsilon"])].groupby("client")["epsilon"].last()
    label_ends(
        figure.axes[0],
        [(float(last[name]), name, colour_of(at)) for at, name in enumerate(names) if name in last],
    )
    return figure


def draw_spending(spending: pd.DataFrame, budget: float, condition: str) -> Any:
    """Return a figure of epsilon by round and client, with the budget and where clients stop; without what is infinite.

    Args:
        spending: See :func:`fedlora.reports.frames.spending_frame`.
        budget: Of each client; 0: none.
        condition: Of epsilon.
    """
    figure, axes = framed(condition)
    spending = spending[np.isfinite(spending["epsilon"])]
    for number, (_, own) in enumerate(spending.groupby("client")):
        axes.plot(own["round"], own["epsilon"], color=colour_of(number), linewidth=1.2, marker=".", alpha=0.8)
    stops = spending[spending["stopped"]]
    axes.plot(stops["round"], stops["epsilon"], "x", color="black", markersize=9, markeredgewidth=2)
    if len(stops):
        first = stops.sort_values("round").iloc[0]
        axes.annotate(
            f"{len(stops)} client(s) stop: a round more\nwould pass the budget",
            (first["round"], first["epsilon"]),
            (0.97, 0.08),
            textcoords="axes fraction",
            ha="right",
            fontsize=SIZE - 1,
            arrowprops={"arrowstyle": "->", "color": GREY},
        )
    if budget:
        axes.axhline(budget, color="black", linestyle="--", linewidth=1)
        axes.text(
            0.02, budget, f"budget {budget:g}", fontsize=SIZE - 1, va="bottom", transform=axes.get_yaxis_transform()
        )
    axes.set(xlabel="round", ylabel="epsilon of each client")
    axes.set_ylim(0, max([budget, *spending["epsilon"]]) * 1.15 or 1.0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_noise(noise: pd.DataFrame, condition: str) -> Any:
    """Return a figure of the noise multiplier that an epsilon takes, a line for each sample rate.

    Args:
        noise: See :func:`simulations.budget.noise_by_epsilon`.
        condition: Of epsilon.
    """
    figure, axes = framed(condition)
    by_rate = noise.sort_values("epsilon").set_index("epsilon").groupby("sample_rate")["noise_multiplier"]
    ends = draw_lines(axes, ((f"rate {rate:g}", line) for rate, line in by_rate))
    axes.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="noise multiplier")
    plain_ticks(axes, sorted(noise["epsilon"].unique()))
    few_ticks(axes)
    label_ends(axes, ends)
    return figure


def draw_accountants(frame: pd.DataFrame, condition: str) -> Any:
    """Return a figure of epsilon by steps under each accountant; Gaussian DP's approximation beside them.

    Args:
        frame: See :func:`simulations.budget.accountants`.
        condition: Of epsilon.
    """
    figure, axes = framed(condition)
    words = {"pld": "PLD (counts)", "prv": "PRV", "rdp": "RDP, looser", "gdp": "GDP: no bound"}
    by_accountant = frame.set_index("steps").groupby("accountant", sort=False)["epsilon"]
    ends = draw_lines(axes, ((words.get(str(by), str(by)), line) for by, line in by_accountant))
    axes.set(xlabel="steps", ylabel="epsilon of the same ledger")
    axes.set_ylim(0, None)
    label_ends(axes, ends)
    return figure


def draw_diagnostics(diagnostics: pd.DataFrame) -> Any:
    """Return a figure of clipped fraction and signal to noise by round and strategy: mean over clients, least and most.

    Args:
        diagnostics: See :func:`fedlora.reports.frames.diagnostics_frame`.
    """
    figure, (above, below) = new_figure((6.4, 5.4), rows=2)
    for axes, column, words in (
        (above, "clipped_fraction", "clipped rows"),
        (below, "signal_to_noise", "signal to noise\nof a step"),
    ):
        by_round = {
            str(name): own.groupby("round")[column] for name, own in diagnostics.groupby("strategy", sort=False)
        }
        ends = draw_lines(axes, ((name, by.mean()) for name, by in by_round.items()))
        for (_, _, colour), by in zip(ends, by_round.values(), strict=True):
            axes.fill_between(by.min().index, by.min(), by.max(), color=colour, alpha=0.12, linewidth=0)
        axes.set_ylabel(words, fontsize=SIZE)
        if axes is above:
            axes.set_ylim(0, 1.05)  # a share; matplotlib would zoom into one that is constant
        axes.tick_params(labelsize=SIZE - 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        label_ends(axes, ends)
    below.set_xlabel("round", fontsize=SIZE)
    foot(figure, f"Mean over clients, and least to most. Measured on single rows: {OUTSIDE}, and never sent.")
    return figure


def draw_clipping(run: Run) -> Any | None:
    """Return :func:`draw_diagnostics` of a run; None where its clients left none in its folder, or are many."""
    many = len(run.privacy.get("clients", ())) > MANY
    diagnostics = pd.DataFrame() if many else diagnostics_frame([run])
    return None if diagnostics.empty or "signal_to_noise" not in diagnostics else draw_diagnostics(diagnostics)


def draw_schedules(
    frame: pd.DataFrame, condition: str, across: str = "rounds", learns_from: float | None = None
) -> Any:
    """Return a figure of the signal to noise that one budget buys, by rounds or clients, a line for each batch size.

    Args:
        frame: See :func:`simulations.budget.schedules`.
        condition: Of epsilon.
        across: ``rounds``: of a client's steps together; ``clients``: of the mean over clients.
        learns_from: The signal to noise of a client's steps from which runs of this strategy learned on SST-2, as
            ``fedlora plan`` says it.
    """
    figure, axes = framed(condition)
    column = "signal_to_noise" if across == "rounds" else "signal_to_noise_of_mean"
    by_batch = frame.groupby("batch_size")
    ends = draw_lines(axes, ((f"batch {batch}", own.groupby(across)[column].max()) for batch, own in by_batch))
    axes.set(xscale="log", yscale="log", xlabel=across, ylabel="signal to noise, at best")
    plain_ticks(axes, sorted(frame[across].unique()))
    if learns_from is not None:
        axes.axhline(learns_from, color=GREY, linestyle=":", linewidth=1)
        words = f"{learns_from:g}: runs on SST-2 learned"
        axes.text(frame[across].min(), learns_from, words, fontsize=SIZE - 2, va="bottom")
    few_ticks(axes)
    label_ends(axes, ends)
    return figure


def draw_cells(groups: pd.DataFrame, measure: str, condition: str) -> Any:
    """Return a figure of a measure of each group of a sweep, from the best to the worst.

    Args:
        groups: A sweep's groups.
        measure: Such as ``test_accuracy``.
        condition: Of epsilon.
    """
    figure, axes = framed(condition)
    varied = [str(name) for name in groups.columns]
    keys = [name for name in varied[: varied.index("n")] if groups[name].nunique() > 1]
    ordered = groups.sort_values(f"{measure}_mean", ascending=False)
    names = [", ".join(f"{key.split('.')[-1]} {row[key]}" for key in keys) for _, row in ordered.iterrows()]
    spread = ordered.get(f"{measure}_std", pd.Series(np.nan, ordered.index)).fillna(0.0)
    axes.errorbar(ordered[f"{measure}_mean"], range(len(names)), xerr=spread, fmt="o", color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(names)), [_wrapped(plain_text(name), 34) for name in names], fontsize=SIZE - 3)
    axes.invert_yaxis()
    axes.set_xlabel(measure.replace("_", " "))
    return figure


def draw_membership(frame: pd.DataFrame, condition: str, false_positives: float = 0.01) -> Any:
    """Return a figure of the rows that attackers name, for each training, with 95 % intervals and what epsilon allows.

    Args:
        frame: Lines of :meth:`simulations.membership.Membership.frame` below one another, with a column ``training``.
        condition: Of epsilon.
        false_positives: The share of rows not seen that may be named.
    """
    figure, axes = framed(condition)
    trainings = list(dict.fromkeys(frame["training"]))
    attacks = list(dict.fromkeys(frame["attack"]))
    for number, attack in enumerate(attacks):
        own = frame[frame["attack"] == attack].set_index("training").loc[trainings]
        y = np.arange(len(trainings)) + 0.16 * (2 * number - len(attacks) + 1)
        apart = np.abs(np.stack([own["named"] - own["named_low"], own["named_high"] - own["named"]]))
        axes.errorbar(
            own["named"],
            y,
            xerr=apart,
            fmt=MARKS[number],
            color=colour_of(number),
            capsize=3,
            label=_wrapped(attack, 30),
        )
    bounds = frame.groupby("training")["named_at_most"].first().loc[trainings]
    for at, (training, bound) in enumerate(bounds.items()):
        if math.isinf(frame.loc[frame["training"] == training, "epsilon"].iloc[0]):
            continue  # nothing bounds what can be named
        axes.plot([bound, bound], [at - 0.3, at + 0.3], color="black", linewidth=2)
    axes.axvline(false_positives, color=GREY, linestyle=":", linewidth=1)
    axes.text(false_positives, -0.62, " blind guess", color=GREY, fontsize=SIZE - 2)
    axes.text(1.0, -0.62, "| what epsilon allows ", fontsize=SIZE - 2, ha="right")
    axes.set_yticks(range(len(trainings)), [plain_text(name) for name in trainings])
    axes.set_ylim(len(trainings) - 0.4, -0.75)
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xticks([0, 0.01, 0.1, 1.0], ["0", "1 %", "10 %", "100 %"])
    axes.minorticks_off()
    axes.set_xlim(0, 1.2)
    axes.set_xlabel(f"training rows named, at {false_positives:.0%} false ones")
    axes.legend(frameon=False, fontsize=SIZE - 3, loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)
    return figure


def draw_trust() -> Any:
    """Return a picture of who sees what under record-level DP at the client, and what is promised of it."""
    figure, axes = new_figure((6.4, 3.6))
    axes.set(xlim=(0, 13), ylim=(0, 6.4))
    axes.axis("off")
    boxes = (
        (0.1, "client", "rows, losses,\ngradients, ledger:\nstay here", COLOURS[2]),
        (4.75, "server", "sees every update:\nis the adversary", COLOURS[1]),
        (9.4, "any reader", "of the adapter:\nsees the average", COLOURS[0]),
    )
    for x, name, words, colour in boxes:
        box = FancyBboxPatch((x, 2.3), 3.5, 2.5, "round,pad=0.05", edgecolor=colour, facecolor="white", linewidth=2)
        axes.add_patch(box)
        axes.text(x + 1.75, 4.3, name, ha="center", va="center", fontsize=SIZE, fontweight="bold", color=colour)
        axes.text(x + 1.75, 3.2, words, ha="center", va="center", fontsize=SIZE - 1.5)
    for start, end in ((3.65, 4.7), (8.3, 9.35)):
        axes.add_patch(FancyArrowPatch((start, 3.5), (end, 3.5), arrowstyle="-|>", mutation_scale=16))
    axes.plot([4.15, 4.15], [2.0, 5.4], color="black", linestyle="--")
    axes.text(4.15, 5.6, "clip each row, add noise: right of here epsilon holds", ha="center", fontsize=SIZE - 0.5)
    for y, words in (
        (1.3, "Promised: nobody right of the line can be sure whether one row was used."),
        (0.7, "Not promised: for several rows of one person; of what all rows say;"),
        (0.1, "that a client takes part."),
    ):
        axes.text(0.1, y, words, fontsize=SIZE - 1)
    return figure


def conditions_line(config: Config, *, delta: float = 0.0, accountants: str = "") -> str:
    """Return the conditions of a configuration's epsilon: unit, neighbours, adversary, delta, sampling, accountant.

    Args:
        config: The configuration, settled.
        delta: Another delta; 0: the configuration's.
        accountants: Others than the configuration's.
    """
    return f"Delta {delta or config.privacy.delta:g}, {conditions(config, accountants)}"


def _wrapped(words: str, width: int) -> str:
    """Return words on several lines; keys such as ``batch-size`` stay whole."""
    return textwrap.fill(words, width, break_on_hyphens=False)
