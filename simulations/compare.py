"""A planned run under other strategies and methods: what each would train and send, beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

from rich.console import Console
from rich.table import Table

from fedlora.config import Config
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


@final
@dataclass(frozen=True)
class Alternative:
    """A strategy on a method in a run's place.

    Attributes:
        strategy: Name of the strategy.
        method: Name of the method.
        config: The run's configuration with both; None: they do not go with its other settings.
        built: The strategy; None likewise.
        refused: Why they do not.
    """

    strategy: str
    method: str
    config: Config | None = None
    built: Strategy | None = None
    refused: str = ""


def alternatives(plan: Plan, structure: Structure) -> Iterator[Alternative]:
    """Yield every strategy on every method that it works with, at a run's rank, alpha and options.

    Server optimizer, local terms and ranks by client are left out: few strategies have them all.
    """
    base = plan.config.to_flat() | {"method.ranks": "", "server.optimizer": "none", "local.term": "none"}
    for name in STRATEGIES:
        for method in methods_of(name):
            try:
                resolved = resolve(base | {"strategy.name": name, "method.name": method})
                config = replace(resolved, federation=plan.config.federation)
                built = build_strategy(config, build_method(config, structure.adapted, structure.head).specs())
            except ValueError as error:
                yield Alternative(name, method, refused=first_line(error))
            else:
                yield Alternative(name, method, config, built)


def show_alternatives(plan: Plan, structure: Structure, console: Console) -> None:
    """Print what a client would train and send under each of them, the fewest bytes first, and what was refused."""
    table = Table(title="The run under other strategies and methods, at its rank and options", title_justify="left")
    for column in ("strategy", "method", "server mean"):
        table.add_column(column)
    for column in ("trained", "sent a client and round", "sent in all", "received in all"):
        table.add_column(column, justify="right")
    rows, refused = [], []
    for one in alternatives(plan, structure):
        if one.config is None or one.built is None:
            refused.append(one)
            continue
        ups, downs = replace(plan, config=one.config, strategy=one.built).traffic
        each = sum(ups) / (plan.sampled * len(ups))
        numbers = [f"{trained_in_a_round(one.built):,}", *map(human_bytes, (each, sum(ups), sum(downs)))]
        rows.append((sum(ups) + sum(downs), [one.strategy, one.method, _MEANS[one.built.exact], *numbers]))
    for _, cells in sorted(rows, key=lambda row: row[0]):
        table.add_row(*cells)
    console.print(table)
    for one in refused:
        console.print(f"not with these settings: {one.strategy} on {one.method}: {one.refused}", markup=False)
    console.print(
        "Server mean: whether the server's update is the mean of the clients'; none: models stay with clients. A rank "
        "is not the same everywhere: docs/strategies.md says which suits each method.",
        markup=False,
    )


def trained_by_strategy(plan: Plan, structure: Structure) -> dict[str, int]:
    """Return the numbers that a client trains in a round under each strategy, on its own method, where that fits."""
    return {
        one.strategy: trained_in_a_round(one.built)
        for one in alternatives(plan, structure)
        if one.built is not None and one.method == methods_of(one.strategy)[0]
    }
