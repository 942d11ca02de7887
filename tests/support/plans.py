"""Plans of runs on the tiny model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.data import load_federated
from simulations.plan import Plan
from simulations.plan_words import show
from simulations.setup import federation_of, resolve
from strategies.build import build_strategy
from tests.support.trainers import tiny_flat, tiny_worker


def plan(folder: Path, **changes: Any) -> Plan:
    """Return the plan of a run on two nodes with one trainer."""
    config = resolve(tiny_flat(folder, **changes))
    description = tiny_worker(folder, **changes).describe()
    data = load_federated(config, config.federation.num_clients)
    return Plan(
        config=config,
        data=data,
        strategy=build_strategy(config, description.specs),
        federation=federation_of(config),
        family="bert",
        num_parameters=1000,
        num_layers=4,
        nodes=2,
        trainers=1,
    )


def shown(one: Plan) -> str:
    """Return what a plan prints."""
    console = Console(file=io.StringIO(), width=200)
    show(one, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
