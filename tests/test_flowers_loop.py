"""The wrapped form: every strategy under Flower's own loop gives what it gives under ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerBase

from fedlora.config import ServerConfig
from fedlora.roles import Role
from fedlora.server import FederationError
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.wire import from_named_arrays
from strategies.fedprox import FedProx
from strategies.round_schedule import RoundSchedule
from strategies.scaffold import Scaffold
from strategies.server_optimizers import ServerOptimizer
from tests.support.federation import server_of, servers, strategy_of
from tests.support.loop import LoopGrid, node_of

WRAPPED: dict[str, Callable[[Strategy], Strategy]] = {
    "scaffold": lambda inner: Scaffold(inner, 5, 2),
    "adam": lambda inner: ServerOptimizer(inner, ServerConfig("adam")),
    "prox, linear": lambda inner: RoundSchedule(FedProx(inner, 0.1), 4, "linear", 1),
}


def both_loops(strategy: Strategy, method: str) -> tuple[tuple[Result, ServerState], tuple[Result, ServerState]]:
    """Return results and states after four rounds under our loop and under Flower's."""
    ended = []
    for start in (
        lambda server, *args: server.start(*args, num_rounds=4),
        lambda *args: FlowerBase.start(*args, num_rounds=4),
    ):
        server = server_of(strategy, method, clients_per_round=3, learning_rate=0.1, dtype="float32")
        result = start(server, LoopGrid({1: node_of(server), 2: node_of(server)}), server.arrays)
        ended.append((result, server.state))
    return ended[0], ended[1]


def check_equal(strategy: Strategy, method: str) -> None:
    (ours, our_state), (theirs, their_state) = both_loops(strategy, method)
    assert ours.arrays is not None
    assert theirs.arrays is not None
    one, two = from_named_arrays(ours.arrays), from_named_arrays(theirs.arrays)
    assert one.keys() == two.keys() == our_state.tensors.keys()
    assert all(np.array_equal(two[name], value) for name, value in one.items())
    assert our_state.arrays().keys() == their_state.arrays().keys()
    assert all(np.array_equal(their_state.arrays()[name], value) for name, value in our_state.arrays().items())
    assert our_state.clients == their_state.clients
    for metrics in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        here, there = getattr(ours, metrics), getattr(theirs, metrics)
        assert {number: dict(record) for number, record in here.items()} == {n: dict(r) for n, r in there.items()}
    assert sorted(theirs.train_metrics_clientapp) == [1, 2, 3, 4]
    assert bool(theirs.evaluate_metrics_clientapp) == strategy.has_personal


@servers
def test_every_strategy(name: str, method: str, ranks: tuple[int, ...]) -> None:
    """Accumulated tensors and personal evaluations included."""
    check_equal(strategy_of(name, method, ranks), method)


@pytest.mark.parametrize("head", [Role.SHARED, Role.PERSONAL])
@pytest.mark.parametrize("around", WRAPPED)
@pytest.mark.parametrize("name", ["fedavg", "rolora"])
def test_every_strategy_around_another(name: str, around: str, head: Role) -> None:
    """What is exchanged beside the tensors and what an optimizer keeps are in the state, which both loops leave be."""
    check_equal(WRAPPED[around](strategy_of(name, "lora", head=head)), "lora")


def test_too_many_failures_stop_flowers_loop_too() -> None:
    server = server_of(strategy_of("fedavg", "lora"), "lora")
    grid = LoopGrid({1: lambda _message: RuntimeError("out of memory")})
    with pytest.raises(FederationError, match=r"5 of 5 clients failed.*out of memory"):
        FlowerBase.start(server, grid, server.arrays, num_rounds=2)


def test_a_start_without_its_state_is_refused_with_the_cure() -> None:
    """Flower passes arrays around and nothing else: variates must be in the state."""
    server = server_of(Scaffold(strategy_of("fedavg", "lora"), 5, 2), "lora")
    arrays = server.arrays
    server.state = ServerState({})
    with pytest.raises(ValueError, match=r"the initial state lacks variate/.*start with FlowerStrategy\("):
        FlowerBase.start(server, LoopGrid({1: node_of(server)}), arrays, num_rounds=1)


def test_a_round_that_asks_nobody_to_evaluate_reports_nothing() -> None:
    server = server_of(strategy_of("fedavg", "lora"), "lora")
    grid = LoopGrid({1: node_of(server)})
    assert list(server.configure_evaluate(1, server.arrays, Any, grid)) == []  # type: ignore[arg-type]
    assert server.aggregate_evaluate(1, []) is None
