"""Membership inference against clients' releases: what an attacker finds out of which rows were trained on.

Many clients train for one round, each on a random half of the same rows, as many at a time as a pack holds: each is a
model to attack, and a shadow for the attacks on the others. They train as any client does, sampler, clip, noise and
ledger included. Two attackers are tried. One has the adapter that a client releases, and asks the model about a row;
the other is the server, which compares the update with the row's gradient at the start of the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any, final

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fedlora.config import Config, ConfigError, to_toml
from fedlora.config.training import PrivacyConfig
from fedlora.data import FederatedData, load_federated
from fedlora.exchange import Update
from fedlora.privacy import Mechanism, attacks, certifier, epsilon
from fedlora.shapes import cut
from fedlora.tasks import TASKS
from simulations.audit.findings import flat
from simulations.audit.site import held_by, unit_steps
from simulations.in_process import InProcess, Resident
from simulations.setup import resolve, settle

ADAPTER = "the released adapter, asked about the row"
UPDATE = "the update, beside the row's gradient"
_LEAST_ROWS = 20


@final
@dataclass(frozen=True)
class Membership:
    """Models, and what attackers made of them.

    Attributes:
        config: The settled configuration.
        seen: Which model was trained on which row, [models, rows].
        ratios: By attack how likely a model has seen a row, [models, rows].
        facts: Facts of each row under each model, [models, rows] by name; ``loss`` is among them.
    """

    config: Config
    seen: NDArray[np.bool_]
    ratios: dict[str, NDArray[np.float64]]
    facts: dict[str, NDArray[np.float64]]

    @cached_property
    def epsilon(self) -> float:
        """What each model has spent; infinite without DP."""
        if self.config.privacy.mode == "none":
            return float("inf")
        use = Mechanism.of(self.config).use(1)
        return epsilon([use], target_delta=self.config.privacy.delta, accountant=certifier(self.config))

    def frame(self, false_positives: float = 0.01) -> pd.DataFrame:
        """Return a line for each attack.

        Args:
            false_positives: The share of rows not seen that may be named.
        """
        seen, bound = self.seen, attacks.found_at_most(self.epsilon, self.config.privacy.delta, false_positives)
        loss = self.facts["loss"]
        return pd.DataFrame(
            {
                "epsilon": self.epsilon,
                "attack": attack,
                "named": attacks.found_at(ratios, seen, false_positives),
                **dict(zip(("named_low", "named_high"), attacks.interval(ratios, seen, false_positives), strict=True)),
                "named_at_most": bound,
                "area": attacks.area_under_curve(ratios, seen),
                "loss_seen": float(loss[seen].mean()),
                "loss_not_seen": float(loss[~seen].mean()),
                "models": len(seen),
                "rows": seen.shape[1],
                "delta": self.config.privacy.delta,
            }
            for attack, ratios in self.ratios.items()
        )


def membership(
    settings: Sequence[Mapping[str, Any]], *, models: int = 128, rows: int = 200, seed: int = 0
) -> list[Membership]:
    """Attack models of several configurations, one after another on one resident base model.

    Args:
        settings: The configurations by dotted key, each whole; rounds, clients and declared size are set here.
        models: Trained on a half of the rows each.
        rows: Training rows that are asked about.
        seed: Of rows and halves, which are the same for all configurations.

    Raises:
        ConfigError: A configuration cannot work, or says too little of rows.
    """
    if models // 2 - 1 < attacks.LEAST_MODELS:
        raise ConfigError(
            f"models = {models}: {2 * attacks.LEAST_MODELS + 2} are needed, to know models that have not seen a row."
        )
    resident, found, gradients = Resident(torch.get_num_threads()), list[Membership](), dict[str, Any]()
    for one in settings:
        config = resolve(_of_one_round(one, models, rows))
        task = TASKS[config.task]
        if not (task.has_head and task.has_classes and task.one_class):
            raise ConfigError(f"task = {config.task!r}: membership is asked of classifiers, one label a row.")
        data = load_federated(config, 2)
        if len(data.corpus.train) < rows or rows < _LEAST_ROWS:
            raise ConfigError(f"{len(data.corpus.train)} training rows, of which {rows} are asked about: name fewer.")
        generator = np.random.default_rng(seed)
        pool = np.sort(generator.choice(len(data.corpus.train), rows, replace=False))
        halves = np.arange(models) % 2 == 0  # of the models; each row is in one half of them
        seen = generator.permuted(np.repeat(halves[:, None], rows, axis=1), axis=0)
        settled, mine = settle(config, models, held_by(data, [pool[half] for half in seen]))
        with TemporaryDirectory() as folder:
            federation = resident.federation(settled, mine, folder)
            updates = federation.released(1)
            facts = federation.facts(updates, pool.tolist())
            moved = _moved(federation, updates)
        plain = _one_step(config, len(pool))
        key = to_toml({key: value for key, value in plain.to_flat().items() if not key.startswith("run.")})
        if key not in gradients:
            gradients[key] = _gradients(resident, plain, data, pool)
        scores = {ADAPTER: attacks.logit(facts["loss"]), UPDATE: -moved @ gradients[key].T}
        ratios = {attack: attacks.likelihood_ratios(value, seen) for attack, value in scores.items()}
        found.append(Membership(settled, seen, ratios, facts))
    return found


def _of_one_round(one: Mapping[str, Any], models: int, rows: int) -> dict[str, Any]:
    if one.get("method.ranks"):
        raise ConfigError(f"method.ranks = {one['method.ranks']!r}: membership is asked of clients of one rank.")
    own: dict[str, Any] = {"rounds": 1, "federation.num-clients": models, "federation.clients-per-round": 0}
    own |= {"data.partition": "iid", "data.holdout": 0.0, "privacy.client-size": 0, "run.resume": False}
    if one.get("privacy.mode", "none") != "none":
        own["privacy.client-size"] = rows // 2
    return {**one, **own}


def _moved(federation: InProcess, updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return by what each update moved what the server holds, [clients, P]."""
    start = federation.core.state.tensors
    return np.stack(
        [
            flat({name: value - cut(start[name], value.shape) for name, value in sorted(one.tensors.items())})
            for one in updates
        ]
    )


def _one_step(config: Config, clients: int) -> Config:
    """Return a configuration by which each client's update is the gradient of its one row, with the sign turned."""
    return replace(
        config,
        federation=replace(config.federation, num_clients=clients),
        privacy=PrivacyConfig(),
        train=unit_steps(config.train, 1, 1),
    )


def _gradients(resident: Resident, plain: Config, data: FederatedData, pool: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the gradient of each row where a round starts, of length one, [rows, P]: by one step of SGD."""
    settled, mine = settle(plain, len(pool), held_by(data, [pool[[at]] for at in range(len(pool))]))
    with TemporaryDirectory() as folder:
        federation = resident.federation(settled, mine, folder)
        gradients = -_moved(federation, federation.released(1))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    return gradients
