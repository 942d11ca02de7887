"""Runs that several modules check, and a Flower of its own for those that start plain ``flwr``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simulations.keeper import end_processes
from simulations.superlink import flower_environment
from tests.support.runs import Finished, fedlora_run

PACKED: dict[str, Any] = {
    "rounds": 4,
    "engine.pack": 2,
    "strategy.name": "fedavg",
    "train.local-steps": 8,
    "train.learning-rate": 0.05,
}
LONG: dict[str, Any] = {
    "rounds": 5,
    "strategy.name": "mos-personal",
    "method.head": "personal",
    "train.local-steps": 6,
    "train.learning-rate": 0.05,
    "federation.clients-per-round": 3,
    "engine.dtype": "float32",
    "eval.baselines": True,
}


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four clients on two SuperNodes, in packs of two, one trainer."""
    return fedlora_run(tmp_path_factory.mktemp("packed"), **PACKED)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Personal shards and heads, three of four clients a round, baselines."""
    return fedlora_run(tmp_path_factory.mktemp("undisturbed"), **LONG)


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower of its own; whatever it starts is ended afterwards."""
    home = tmp_path / "flower"
    home.mkdir()
    yield flower_environment(home)
    end_processes(home)
