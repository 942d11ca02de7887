"""Zero-padding: what clients of different ranks are sent, and what becomes of ranks that few of them hold."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.config import ServerConfig
from fedlora.wire import read_instruction
from strategies import FedAvg
from strategies.server_optimizers import ServerOptimizer
from tests.support.federation import RAGGED, one_round, run, seeded_of, server_of, strategy_of
from tests.support.formulas import LAYERS
from tests.support.loop import LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import setting


def test_padded_with_zeros_and_averaged() -> None:
    """By the formula, with rows and columns of zeros for ranks that a client lacks."""
    strategy = strategy_of("zero-padding", "lora", RAGGED)
    server = server_of(strategy, "lora")
    ended = run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 1)
    total = sum(examples_of(k) for k in range(5))
    for name, spec in strategy.expected(1).items():
        mean = np.zeros(spec.shape)
        for client in range(5):
            own = update_of(client, 1, strategy.expected(1, client))[name]
            mean[tuple(slice(n) for n in own.shape)] += examples_of(client) / total * own
        assert np.abs(ended[name] - mean).max() < 1e-13


def test_ranks_that_no_client_of_the_round_holds_stay() -> None:
    """Our choice; those that some hold are pulled towards zero by the others."""
    strategy = strategy_of("zero-padding", "lora", (1, 1, 3))
    server = server_of(strategy, "lora", clients=3)
    wide = LoopGrid({1: node_of(server), 2: node_of(server), 3: lambda _message: None})
    before = seeded_of("lora")
    ended = run(server, wide, 1)
    name = LAYERS[0].name
    assert np.array_equal(ended[f"{name}.lora_A"][1:], before[f"{name}.lora_A"][1:])
    assert np.array_equal(ended[f"{name}.lora_B"][:, 1:], before[f"{name}.lora_B"][:, 1:])
    assert np.abs(ended[f"{name}.lora_A"][0] - before[f"{name}.lora_A"][0]).max() > 1e-3


def test_a_server_optimizer_moves_no_rank_that_no_client_of_the_round_holds() -> None:
    """Nor does it let their moments decay: round two has the clients of rank one alone."""
    strategy = ServerOptimizer(strategy_of("zero-padding", "lora", (1, 1, 3)), ServerConfig("momentum"))
    server = server_of(strategy, "lora", clients=3)
    name = f"{LAYERS[0].name}.lora_A"
    first = run(server, LoopGrid({k: node_of(server) for k in (1, 2, 3)}), 1)
    moments = server.state.extra[f"m/{name}"]
    second = one_round(server, LoopGrid({1: node_of(server), 2: node_of(server), 3: lambda _message: None}), 2)
    assert np.array_equal(second[name][1:], first[name][1:])
    assert np.array_equal(server.state.extra[f"m/{name}"][1:], moments[1:])
    assert np.any(moments[1:])
    assert np.abs(second[name][0] - first[name][0]).max() > 1e-3


def test_identical_clients_of_fewer_ranks_pull_the_others_down() -> None:
    """The bias that the strategy is known for: a rank that one of two equal clients holds is halved."""
    strategy = strategy_of("zero-padding", "lora", (1, 3))
    server = server_of(strategy, "lora", clients=2, weights="equal")
    before = seeded_of("lora")
    ended = run(server, LoopGrid({1: node_of(server, same=before)}), 1)
    name = f"{LAYERS[0].name}.lora_A"
    assert np.abs(ended[name][0] - before[name][0]).max() < 1e-15
    assert np.abs(ended[name][1:] - before[name][1:] / 2).max() < 1e-15


def test_a_node_is_sent_what_its_widest_client_holds() -> None:
    server = server_of(strategy_of("zero-padding", "lora", (1, 1, 3, 2, 1)), "lora")
    grid = LoopGrid({1: node_of(server), 2: node_of(server), 3: node_of(server)})
    run(server, grid, 1)
    shapes = {
        read_instruction(m.content).clients: read_instruction(m.content).tensors["m.0.q.lora_A"].shape
        for m in grid.sent
    }
    assert shapes == {(0, 1): (1, 6), (2,): (3, 6), (3, 4): (2, 6)}
    assert [read_instruction(m.content).ranks for m in grid.sent] == [(1, 1), (3,), (2, 1)]


@pytest.mark.parametrize("ranks", [(), (3, 3, 3, 3, 3)])
def test_equal_ranks_are_fedavg_to_the_bit(ranks: tuple[int, ...]) -> None:
    ended = []
    for strategy in (strategy_of("zero-padding", "lora", ranks), FedAvg(setting("lora"))):
        server = server_of(strategy, "lora", dtype="float32")
        ended.append(run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 3))
    assert all(np.array_equal(ended[0][name], value) for name, value in ended[1].items())
