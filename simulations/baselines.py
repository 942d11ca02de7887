"""What a federated curve is compared with: each client alone, and all data in one place.

Both train the tensors that the run trains, with the run's own optimizer and learning rate. Alone, each client takes
the steps that it took in the federation, and shares nothing. In one place, a single client has all training rows
and sees as many examples in all as the federation did. Each is a run of its own in the folder ``baselines/``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from clients.pool import split_packs
from clients.trainer import Request
from fedlora.config import Config, PrivacyConfig
from fedlora.data import FederatedData
from fedlora.runs.folder import RunFolder, read_lines, run_path
from fedlora.seeded import Seeded
from simulations.setup import build_strategy

if TYPE_CHECKING:
    from simulations.simulation import Simulation

_ALONE = 100  # clients whose own models are evaluated on all test rows, at most


def run_baselines(run: Simulation) -> dict[str, float]:
    """Run both, or go on with them, and return their numbers for ``result.json``."""
    split = "test" if run.config.eval.test else "dev"
    return {**_alone(run, split), **_central(run, f"{split}_{run.task.measure.name}")}


def _alone(run: Simulation, split: str) -> dict[str, float]:
    from simulations.simulation import summarise

    config = _config(run, "alone", "local")
    result = _result(run, config, run.data)
    outcome = {f"alone_{name}": value for name, value in result.items() if name.startswith("clients_")}
    measure = run.task.measure
    scores = _alone_on(run, config, split)
    for name, value in summarise(scores, measure.name, measure.higher_is_better).items():
        outcome[f"alone_{split}_{name.removeprefix('clients_')}"] = value
    _tell(run, outcome)
    return outcome


def _alone_on(run: Simulation, config: Config, split: str) -> list[dict[str, Any]]:
    """Return the metrics of each lone client's model on all rows of a split (of many clients, of a hundred)."""
    folder = RunFolder(run_path(config))
    file = folder.path / f"scores-{split}.jsonl"
    if file.is_file():
        return read_lines(file)
    pool = run.session.assigned(config, run.data)
    roles = build_strategy(config, run.description.specs, _frozen(run)).all_roles(1)
    trained = [line["client"] for line in read_lines(folder.path / "scores.jsonl")]
    drawn = Seeded(config.seed).permutation("alone", size=len(trained))[:_ALONE]
    packs = split_packs([trained[at] for at in drawn], config.engine.pack, len(pool))
    requests = [(Request(config.rounds + 1, pack, roles, {}), split) for pack in packs]
    sums = [one for part in pool.call_all("evaluate_personal", requests) for one in part]
    clients = [client for pack in packs for client in pack]
    scores = [run.score(client, one) for client, one in zip(clients, sums, strict=True)]
    folder.write_lines(file.name, scores)
    return scores


def _central(run: Simulation, measure: str) -> dict[str, float]:
    clients = range(len(run.data.clients))
    rows = np.sort(np.concatenate([run.data.training_rows(client) for client in clients]))
    examples = run.plan.examples(run.metrics[-1]["round"])
    config = _config(run, "central", "fedavg")
    config = replace(
        config,
        federation=replace(config.federation, num_clients=1, clients_per_round=0),
        train=replace(
            config.train,
            local_steps=max(1, round(examples / (config.rounds * config.train.batch_size))),
            local_epochs=1,
        ),
    )
    result = _result(run, config, FederatedData(run.data.corpus, (rows,), (np.zeros(0, dtype=np.int64),)))
    outcome = {f"central_{measure}": result[measure]}
    _tell(run, outcome)
    return outcome


def _config(run: Simulation, name: str, strategy: str) -> Config:
    config = run.config
    if run.plan.privacy is not None:  # as many steps as clients took, whatever their rows
        steps = run.plan.privacy.mechanism.steps
        config = replace(config, train=replace(config.train, local_steps=steps, local_epochs=1))
    head = "frozen" if config.method.head == "frozen" else "shared"
    return replace(
        config,
        rounds=run.metrics[-1]["round"],
        run=replace(config.run, dir=str(run.folder.path / "baselines"), name=name, resume=False),
        strategy=replace(config.strategy, name=strategy),
        method=replace(config.method, head=head),
        eval=replace(config.eval, baselines=False),
        privacy=PrivacyConfig(),  # what privacy costs is seen beside what training comes to without it
    )


def _frozen(run: Simulation) -> frozenset[str]:
    """Return the kinds of tensors that the run's clients never train."""
    return frozenset(run.strategy.all_roles(1)) - run.strategy.trained_kinds


def _result(run: Simulation, config: Config, data: FederatedData) -> dict[str, Any]:
    """Return the result of a baseline: what stands in its folder, or what it comes to."""
    file = run_path(config) / "result.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return result
    if (run_path(config) / "config.toml").is_file():
        config = replace(config, run=replace(config.run, resume=True))
    return run.session.run(config, Console(quiet=True), data, _frozen(run))


def _tell(run: Simulation, outcome: dict[str, float]) -> None:
    run.console.print(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in outcome.items()))
