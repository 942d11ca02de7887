"""A federation in one process gives what a run under Flower gives, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from clients.worker import Worker
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.reduce import fold
from fedlora.server import FederationError, FlowerStrategy
from fedlora.wire import Reply, read_instruction
from simulations.in_process import Resident
from simulations.setup import federation_of, resolve, settle
from strategies.build import build_strategy
from tests.support.loop import LoopGrid
from tests.support.trainers import tiny_flat, tiny_job

CASES: dict[str, dict[str, Any]] = {
    "ranks that differ": {"strategy.name": "zero-padding", "method.ranks": "1,2,2,1"},
    "ranks that are pruned": {
        **{"strategy.name": "hetlora", "method.ranks": "1,2,2,1", "method.head": "personal", "data.holdout": 0.2},
        **{"hetlora.penalty": 50.0, "hetlora.decay": 0.5, "rounds": 4},
    },
    "ranks that are pruned, under DP": {
        **{"strategy.name": "hetlora", "method.ranks": "1,2,2,1", "hetlora.penalty": 50.0, "hetlora.decay": 0.5},
        **{"rounds": 4, "privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.seed": 3, "data.partition": "iid"},
    },
    "modules that differ": {
        **{"strategy.name": "fed-plora", "method.rank": 4, "method.ranks": "1,4,2,3", "method.head": "personal"},
        **{"data.holdout": 0.2, "rounds": 3},
    },
    "modules that differ, under DP": {
        **{"strategy.name": "fed-plora", "method.rank": 4, "method.ranks": "1,4,2,3", "rounds": 3},
        **{"privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.seed": 3, "data.partition": "iid"},
    },
    "heads that differ, under DP": {
        **{"strategy.name": "ravan", "ravan.heads": 4, "method.ranks": "1,4,2,3", "rounds": 3},
        **{"privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.seed": 3, "data.partition": "iid"},
    },
    "blocks in turn, under DP": {
        **{"strategy.name": "lisa", "lisa.blocks": 1, "rounds": 3, "federation.clients-per-round": 2},
        **{"privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.seed": 3, "data.partition": "iid"},
    },
    "accumulated": {"strategy.name": "flora"},
    "matrices that nobody sends": {"strategy.name": "rolora", "method.name": "vera"},
    "one vector, places that nobody sends": {
        "strategy.name": "fedavg",
        "method.name": "uni-lora",
        "uni-lora.length": 64,
    },
    "magnitudes, under DP": {
        **{"strategy.name": "fedavg", "method.name": "dora", "privacy.mode": "dp", "privacy.epsilon": 8.0},
        **{"privacy.seed": 3, "data.partition": "iid"},
    },
    "a proximal step at the server": {"strategy.name": "s2-lora"},
    "gates of ranks that differ, under DP": {
        **{"strategy.name": "zero-padding", "method.name": "sora", "method.ranks": "1,2,2,1"},
        **{"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.seed": 3, "data.partition": "iid"},
    },
    "a rank by round, measured with all": {
        **{"strategy.name": "dylora", "method.rank": 3, "method.head": "personal", "data.holdout": 0.2},
        **{"rounds": 3, "server.optimizer": "momentum"},
    },
    "personal": {"strategy.name": "fedsa-lora", "data.holdout": 0.2},
    "personal, from computed factors": {"strategy.name": "fedsa-lora", "method.init": "pissa", "data.holdout": 0.2},
    "personal in the last rounds alone": {"strategy.name": "feddpa", "feddpa.own-rounds": 1, "data.holdout": 0.2},
    "clusters of clients": {"strategy.name": "fedlease", "data.holdout": 0.2, "rounds": 3},
    "clusters of clients, under DP": {
        **{"strategy.name": "fedlease", "rounds": 3, "privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.seed": 3},
        **{"data.partition": "iid", "data.holdout": 0.2},
    },
    "control variates": {"strategy.name": "fedavg", "local.term": "scaffold", "train.optimizer": "sgd"},
    "gradients of A and B": {
        **{"strategy.name": "zero-padding", "method.ranks": "1,2,2,1", "train.gradient": "lora-pro"},
        "train.b-rate-ratio": 4.0,
    },
    "a part of the clients, under DP": {
        **{"strategy.name": "ffa-lora", "privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.seed": 3},
        **{"federation.clients-per-round": 2, "data.partition": "iid", "train.optimizer": "sgd"},
    },
}


def settled(folder: Path, **changes: Any) -> tuple[Config, FederatedData]:
    return settle(resolve(tiny_flat(folder, **changes)), 4)


def under_flower(config: Config, data: FederatedData, folder: Path) -> FlowerStrategy:
    """Run a configuration under our Flower strategy, on one node whose worker is real."""
    job = tiny_job(config, folder)
    worker = Worker(lambda: job, 1)
    model = worker.loaded.model
    strategy = build_strategy(config, model.specs)
    server = FlowerStrategy(strategy, federation_of(config), strategy.initial({**model.initial, **worker.start()}))

    def node(message: Message) -> RecordDict:
        told = read_instruction(message.content)
        if message.metadata.message_type == "evaluate":
            return Reply(worker.report(told)).to_content()
        return Reply(*fold(told, worker.train(told))).to_content()

    server.start(LoopGrid({1: node}), server.arrays, num_rounds=config.rounds)
    return server


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_under_flower(tmp_path: Path, case: str) -> None:
    config, data = settled(tmp_path, **CASES[case])
    expected = under_flower(config, data, tmp_path / "flower")
    federation = Resident(1).federation(config, data, str(tmp_path / "here"))
    for number in range(1, config.rounds + 1):
        federation.train(number)
    there, here = expected.state.arrays(), federation.core.state.arrays()
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], value) for name, value in there.items())
    assert federation.core.state.clients.trained == expected.state.clients.trained
    if "pruned" in case:
        assert federation.core.strategy.setting.ranks == (1, 1, 1, 1)
    measured = federation.measure(config.rounds)
    if expected.personal is not None and config.privacy.mode == "none":
        sums = expected.personal.sums.values()
        mean = sum(one["loss"] for one in sums) / sum(one["examples"] for one in sums)
        assert measured["loss"] == pytest.approx(mean, rel=1e-12)
    assert 0 <= measured["accuracy"] <= 1


def test_clients_that_fail_end_it_with_the_reason(tmp_path: Path) -> None:
    config, data = settled(tmp_path, **{"strategy.name": "s2-lora", "s2.sparsity": 10.0, "train.optimizer": "sgd"})
    federation = Resident(1).federation(config, data, str(tmp_path / "here"))
    with pytest.raises(FederationError, match="the proximal step set all of"):
        federation.train(1)
