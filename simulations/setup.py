"""From a flat configuration to everything a run is made of, checked before anything loads."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from clients.pool import Shard
from fedlora.config import Config, ConfigError
from fedlora.data import CORPORA
from fedlora.methods import METHODS
from fedlora.server import Federation
from fedlora.tasks import TASKS
from strategies import STRATEGIES

_HOLDOUT = 0.2  # of its rows that a client holds out, where a run needs it and nobody said how many
_THREADS = 4  # threads of one trainer beyond which small models gain little on a CPU


def resolve(flat: Mapping[str, Any]) -> Config:
    """Return the configuration with every ``auto`` and default name filled in.

    Raises:
        ConfigError: A value is of the wrong type, out of range or unknown, or values cannot work together.
    """
    config = Config.from_flat(flat)
    try:
        strategy = STRATEGIES[config.strategy.name]
        method = strategy.methods[0] if config.method.name == "auto" else config.method.name
        METHODS[method]
        strategy.check(config)
        TASKS[config.task]
        CORPORA[config.data.name]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if method not in strategy.methods:
        raise ConfigError(
            f"method.name = {method!r}: strategy {strategy.name!r} works with {', '.join(strategy.methods)}; "
            "choose one of them, or method.name = 'auto'."
        )
    try:
        # On no layers: what does not depend on the model is refused here.
        METHODS[method]((), replace(config, method=replace(config.method, name=method)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.eval.target > 1 and TASKS[config.task].measure.name == "accuracy":
        raise ConfigError(f"eval.target = {config.eval.target}: is an accuracy here, between 0 and 1.")
    name = config.run.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy.name}"
    data = config.data
    if data.holdout == 0 and (strategy.personal or config.method.head == "personal" or config.eval.baselines):
        data = replace(data, holdout=_HOLDOUT)
    # Under DP the number of a client's examples is not sent.
    weights = "equal" if config.privacy.mode == "dp" else config.strategy.weights
    return replace(
        config,
        strategy=replace(config.strategy, weights=weights),
        method=replace(config.method, name=method),
        run=replace(config.run, name=name),
        data=data,
    )


def federation_of(config: Config) -> Federation:
    """Return what the server needs to know of the clients."""
    return Federation(
        num_clients=config.federation.num_clients,
        seed=config.seed,
        clients_per_round=config.federation.clients_per_round,
        weights="examples" if config.strategy.weights == "examples" else "equal",
        failure_threshold=config.federation.failure_threshold,
        dtype=config.engine.tensor_dtype,
        pack=config.engine.pack,
        learning_rate=config.train.learning_rate,
        dp=config.privacy.mode == "dp",
    )


def plan_shards(resources: Mapping[str, float], wanted: int) -> list[Shard]:
    """Cut a machine into shards, one for each trainer.

    Args:
        resources: ``CPU`` and ``GPU`` counts, as Ray reports them.
        wanted: ``engine.trainers``; 0: one a GPU, or on a CPU one for every four cores.
    """
    cpus, gpus = max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))
    trainers = wanted or gpus or max(1, cpus // _THREADS)
    # A share must fit on one GPU, and rounding must not make the last one too large.
    share = math.floor(1e4 / -(-trainers // gpus)) / 1e4 if gpus else 0.0
    return [Shard(threads=max(1, cpus // trainers), gpus=share)] * trainers
