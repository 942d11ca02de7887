"""A planned run under other strategies and methods: what each would train and send, beside each other."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from fedlora.config import PLAIN_GRADIENT
from fedlora.config.fields import dotted
from fedlora.messages import first_line
from fedlora.methods import build_method
from fedlora.models import Structure
from fedlora.plugins import methods_of
from fedlora.reports.format import human_bytes
from fedlora.strategy import Strategy
from simulations.plan import Plan, trained_in_a_round
from simulations.setup import resolve
from strategies import STRATEGIES
from strategies.build import build_strategy

_MEANS = {True: "exact", False: "inexact", None: "none"}


def alternative(plan: Plan, structure: Structure, name: str, method: str) -> Strategy:
    """Return a strategy on a method in a run's place, at the run's rank, alpha and options.

    Server optimizer, local terms, ranks by client and what is done to gradients are left out: few have them all.

    Raises:
        ValueError: They do not go with the run's other settings.
    """
    base = plan.config.to_flat() | {"method.ranks": "", "server.optimizer": "none", "local.term": "none"}
    base |= {dotted("train", name): value for name, value in PLAIN_GRADIENT.items()}
    resolved = resolve(base | {"strategy.name": name, "method.name": method})
    config = replace(resolved, federation=plan.config.federation)
    return build_strategy(config, build_method(config, structure.adapted, structure.head).specs())


def show_alternatives(plan: Plan, structure: Structure, console: Console) -> None:
    """Print what a client would train and send under each of them, the fewest bytes first, and what was refused."""
    table = Table(title="The run under other strategies and methods, at its rank and options", title_justify="left")
    for column in ("strategy", "method", "server mean"):
        table.add_column(column)
    for column in ("trained", "sent a client and round", "sent in all", "received in all"):
        table.add_column(column, justify="right")
    rows, refused = [], []
    pairs = [(strategy, method) for strategy in STRATEGIES for method in methods_of(strategy)]
    for name, method in pairs:
        try:
            strategy = alternative(plan, structure, name, method)
        except ValueError as error:
            refused.append(f"not with these settings: {name} on {method}: {first_line(error)}")
            continue
        ups, downs = replace(plan, config=strategy.setting.config, strategy=strategy).traffic
        each = sum(ups) / (plan.sampled * len(ups))
        numbers = [f"{trained_in_a_round(strategy):,}", *map(human_bytes, (each, sum(ups), sum(downs)))]
        rows.append((sum(ups) + sum(downs), [name, method, _MEANS[strategy.exact], *numbers]))
    for _, cells in sorted(rows, key=lambda row: row[0]):
        table.add_row(*cells)
    console.print(table)
    for line in refused:
        console.print(line, markup=False)
    console.print(
        "Server mean: whether the server's update is the mean of the clients'; none: models stay with clients. A rank "
        "is not the same everywhere: docs/methods.md says which suits each method.",
        markup=False,
    )


def trained_by_strategy(plan: Plan, structure: Structure) -> dict[str, int]:
    """Return the numbers that a client trains in a round under each strategy, on its own method, where that fits."""
    trained = {}
    for name in STRATEGIES:
        try:
            trained[name] = trained_in_a_round(alternative(plan, structure, name, methods_of(name)[0]))
        except ValueError:
            continue  # the settings do not fit this method, rank or model; the run's own strategy does
    return trained
