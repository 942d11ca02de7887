"""Baselines of a federated run: each client alone, and all data in one place.

Both train the tensors that the run trains, with the run's own optimizer and learning rate. Alone, each client takes
the steps that it took in the federation, and shares nothing. In one place, a single client has all training rows
and sees as many examples in all as the federation did. Each is a run of its own in the folder ``baselines/``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedlora.config import Config, LocalConfig, PrivacyConfig, ServerConfig
from fedlora.data import FederatedData
from fedlora.methods import METHODS
from fedlora.runs.folder import RunFolder, read_lines, run_path
from fedlora.seeded import Seeded
from fedlora.tasks import TASKS
from simulations.scores import summarise

_ALONE = 100  # clients whose own models are evaluated on all test rows, at most

RunOne = Callable[[Config, FederatedData, frozenset[str]], dict[str, Any]]
"""Runs a configuration on data, with kinds of tensors frozen; returns what its ``result.json`` holds."""
ScoreAlone = Callable[[Config, frozenset[str], Sequence[int], str], list[dict[str, Any]]]
"""Returns the metrics of clients' own models, at the end of a run with frozen kinds, on all rows of a split."""


@dataclass(frozen=True)
class Federated:
    """The federated run that baselines are compared with.

    Attributes:
        config: Its configuration.
        data: Its data.
        folder: Its folder.
        rounds: Rounds that it took.
        examples: Examples that its clients trained on in them, all together.
        steps: Under DP the steps that each client took in a round, whatever its rows; None without.
        frozen: Kinds of tensors that its clients never train.
    """

    config: Config
    data: FederatedData
    folder: Path
    rounds: int
    examples: int
    steps: int | None
    frozen: frozenset[str]


def run_baselines(run: Federated, run_one: RunOne, score_alone: ScoreAlone, console: Console) -> dict[str, float]:
    """Run both, or go on with them, and return their numbers for ``result.json``.

    Args:
        run: What they are compared with.
        run_one: Runs one of them.
        score_alone: Evaluates lone clients.
        console: Where their numbers go.
    """
    split = "test" if run.config.eval.test else "dev"
    outcome: dict[str, float] = {}
    for part in (_alone(run, run_one, score_alone, split), _central(run, run_one, split)):
        console.print(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in part.items()))
        outcome |= part
    return outcome


def _alone(run: Federated, run_one: RunOne, score_alone: ScoreAlone, split: str) -> dict[str, float]:
    config = _config(run, "alone", "local")
    result = _result(run, run_one, config, run.data)
    outcome = {f"alone_{name}": value for name, value in result.items() if name.startswith("clients_")}
    measure = TASKS[run.config.task].measure
    scores = _alone_on(run, score_alone, config, split)
    for name, value in summarise(scores, measure.name, measure.higher_is_better).items():
        outcome[f"alone_{split}_{name.removeprefix('clients_')}"] = value
    return outcome


def _alone_on(run: Federated, score_alone: ScoreAlone, config: Config, split: str) -> list[dict[str, Any]]:
    """Return the metrics of each lone client's model on all rows of a split (of many clients, of a hundred)."""
    folder = RunFolder(run_path(config))
    file = folder.path / f"scores-{split}.jsonl"
    if file.is_file():
        return read_lines(file)
    trained = [line["client"] for line in read_lines(folder.path / "scores.jsonl")]
    drawn = Seeded(config.seed).permutation("alone", size=len(trained))[:_ALONE]
    scores = score_alone(config, run.frozen, [trained[at] for at in drawn], split)
    folder.write_lines(file.name, scores)
    return scores


def _central(run: Federated, run_one: RunOne, split: str) -> dict[str, float]:
    clients = range(len(run.data.clients))
    rows = np.sort(np.concatenate([run.data.training_rows(client) for client in clients]))
    config = _config(run, "central", "fedavg")
    steps = max(1, round(run.examples / (config.rounds * config.train.batch_size)))
    config = replace(
        config,
        federation=replace(config.federation, num_clients=1, clients_per_round=0),
        train=replace(config.train, local_steps=steps, local_epochs=1),
    )
    data = FederatedData(run.data.corpus, (rows,), (np.zeros(0, dtype=np.int64),))
    measure = f"{split}_{TASKS[run.config.task].measure.name}"
    return {f"central_{measure}": _result(run, run_one, config, data)[measure]}


def _config(run: Federated, name: str, strategy: str) -> Config:
    config = run.config
    if run.steps is not None:
        config = replace(config, train=replace(config.train, local_steps=run.steps, local_epochs=1))
    head = "frozen" if config.method.head == "frozen" else "shared"
    # By itself a client has what it trains, and nothing to train some of (Ravan's heads) on top of.
    ragged = strategy == "local" and METHODS[config.method.name].ragged
    return replace(
        config,
        rounds=run.rounds,
        run=replace(config.run, dir=str(run.folder / "baselines"), name=name, resume=False, trackers=""),
        strategy=replace(config.strategy, name=strategy),
        method=replace(config.method, head=head, ranks=config.method.ranks if ragged else ""),
        local=LocalConfig(),  # nobody else's tensors to be pulled to, and no mean for a server to take a step along
        server=ServerConfig(),
        eval=replace(config.eval, baselines=False, generate=0),
        privacy=PrivacyConfig(),  # what privacy costs is seen beside what training comes to without it
    )


def _result(run: Federated, run_one: RunOne, config: Config, data: FederatedData) -> dict[str, Any]:
    """Return the result of a baseline: what stands in its folder, or what it comes to."""
    file = run_path(config) / "result.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result
    if (run_path(config) / "config.toml").is_file():
        config = replace(config, run=replace(config.run, resume=True))
    return run_one(config, data, run.frozen)
