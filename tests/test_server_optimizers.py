"""Server optimizers: against Flower's own classes, against the formula number by number, and around every strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvgM, FedYogi
from flwr.serverapp.strategy import Strategy as FlowerBase

from fedlora.config import ServerConfig
from fedlora.exchange import ClientReport, Update
from fedlora.methods import TensorSpec
from fedlora.reduce import Reduced
from fedlora.roles import Role
from fedlora.server import FlowerStrategy
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy
from fedlora.wire import read_instruction
from strategies import STRATEGIES, FedAvg
from strategies.scaffold import Scaffold
from strategies.server_optimizers import ServerOptimizer, learning_rate
from tests.support.federation import RAGGED, run, saved, seeded_of, server_of, strategy_of
from tests.support.loop import Arrays, LoopGrid, Node, answer, examples_of, node_of, update_of
from tests.support.matrix import CASES
from tests.support.slow_optimizers import SecondMomentOfTheFirst, Slow

OPTIMIZERS = ("momentum", "adagrad", "adam", "yogi")
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
RULES = {
    "fedsvd",
    "flora",
    "florist",
    "hetlora",
    "fed-plora",
    "flexlora",
    "fedex-lora",
    "lora-fair",
    "fedrot-lora",
    "lora-lego",
    "ravan",
    "fedlease",
}  # other than means
AVERAGING = [
    *((n, m, ()) for n, m in CASES if n not in RULES | {"local"}),
    ("zero-padding", "lora", RAGGED),
]


READ = {
    "momentum": {"momentum": 0.7},
    "adagrad": {"tau": 0.002},
    "adam": {"beta1": 0.8, "beta2": 0.95, "tau": 0.002},
    "yogi": {"beta1": 0.8, "beta2": 0.95, "tau": 0.002},
}


def config(optimizer: str, **changes: Any) -> ServerConfig:
    """What an optimizer reads, unlike its defaults and unlike each other."""
    return ServerConfig(optimizer, **{"learning_rate": 0.03, **READ[optimizer], **changes})


# -- Flower's own -------------------------------------------------------------------------------------


def flowers(settings: ServerConfig) -> FlowerBase:
    """Return Flower's class with equal settings."""
    moments = {"beta_1": settings.beta1, "beta_2": settings.beta2}
    match settings.optimizer:
        case "momentum":
            return FedAvgM(server_learning_rate=settings.learning_rate, server_momentum=settings.momentum)
        case "adagrad":
            return FedAdagrad(eta=settings.learning_rate, tau=settings.tau)
        case "adam":
            return FedAdam(eta=settings.learning_rate, tau=settings.tau, **moments)
    return FedYogi(eta=settings.learning_rate, tau=settings.tau, **moments)


def trained(tensors: Mapping[str, Any], server_round: int, client: int) -> Arrays:
    """What a client makes of the tensors: it moves some by 1, some by 1e-3, as A and B move."""
    specs = {name: TensorSpec(np.shape(value), "A", (), 0.0) for name, value in tensors.items()}
    moves = update_of(client, server_round, specs)
    sizes = {name: 10.0 ** (-3 * (place % 2)) for place, name in enumerate(tensors)}
    return {name: value + sizes[name] * moves[name] for name, value in tensors.items()}


def flower_node(client: int) -> Node:
    def node(message: Message) -> RecordDict:
        number = message.content["config"]["server-round"]
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}  # type: ignore[union-attr]
        metrics = MetricRecord({"num-examples": examples_of(client)})
        if message.metadata.message_type == "train":
            moved = trained(arrays, number, client)  # type: ignore[arg-type]
            return RecordDict({"arrays": ArrayRecord({n: Array(v) for n, v in moved.items()}), "metrics": metrics})
        return RecordDict({"metrics": metrics})

    return node


def our_node(message: Message) -> RecordDict:
    instruction = read_instruction(message.content)
    return answer(
        instruction,
        [
            Update(
                ClientReport(client, examples=examples_of(client), steps=1, metrics={"loss": 1.0}),
                trained(instruction.tensors, instruction.round, client),
            )
            for client in instruction.clients
        ],
    )


@optimizers
def test_equals_flowers_own_class(optimizer: str) -> None:
    """Real messages, six rounds of five clients; ours with partial sums of several clients a node."""
    settings = config(optimizer)
    start = server_of(FedAvg(strategy_of("fedavg", "lora").setting), "lora")
    theirs = flowers(settings).start(LoopGrid({k + 1: flower_node(k) for k in range(5)}), start.arrays, num_rounds=6)
    server = server_of(ServerOptimizer(start.strategy, settings), "lora")
    ours = run(server, LoopGrid({1: our_node, 2: our_node}), 6)
    assert theirs.arrays is not None
    assert ours.keys() == theirs.arrays.keys()
    for name, value in ours.items():
        expected = theirs.arrays[name].numpy()
        assert np.abs(value - expected).max() < 1e-12 * max(1.0, np.abs(expected).max())
        assert np.abs(value - seeded_of("lora")[name]).max() > 1e-5, "control: the server moves"


# -- the formula --------------------------------------------------------------------------------------


def padded(value: Any, shape: tuple[int, ...]) -> Any:
    whole = np.zeros(shape)
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole


@optimizers
@pytest.mark.parametrize(
    ("name", "method", "ranks"), AVERAGING, ids=[f"{n}-{m}{'-ragged' * bool(r)}" for n, m, r in AVERAGING]
)
def test_composes_with_every_strategy_that_averages(
    name: str, method: str, ranks: tuple[int, ...], optimizer: str
) -> None:
    """Five rounds of all clients against the formula: steps counted by tensor, the L1 weight's proximal step after."""
    settings = config(optimizer)
    inner = strategy_of(name, method, ranks)
    server, slow = server_of(ServerOptimizer(inner, settings), method, learning_rate=0.1), Slow(settings)
    held: Arrays = dict(server.state.tensors)
    for number in range(1, 6):
        specs = inner.expected(number)
        for key, spec in specs.items():
            clients = [update_of(k, number, inner.expected(number, k))[key] for k in range(5)]
            shares = [examples_of(k) / sum(map(examples_of, range(5))) for k in range(5)]
            mean = sum(share * padded(own, spec.shape) for share, own in zip(shares, clients, strict=True))
            held[key] = slow.step(key, held[key], mean)
            if spec.l1:
                held[key] = np.sign(held[key]) * np.maximum(np.abs(held[key]) - 0.1 * spec.l1, 0)
    ended = run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 5)
    assert ended.keys() == held.keys()
    assert all(np.abs(ended[key] - value).max() < 1e-12 for key, value in held.items())


def test_steps_are_counted_by_tensor() -> None:
    """RoLoRA shares B in odd rounds, A in even ones, and the head in all."""
    server = server_of(ServerOptimizer(strategy_of("rolora", "lora"), config("adam")), "lora")
    run(server, LoopGrid({1: node_of(server)}), 5)
    counts = {name: int(value[0]) for name, value in server.state.named("t").items()}
    assert counts["m.0.q.lora_B"] == 3
    assert counts["m.0.q.lora_A"] == 2
    assert counts["head.weight"] == 5


# -- defaults -----------------------------------------------------------------------------------------

TABLE = {
    "momentum": (1.0, 1.0, 1.0, 1.0),
    "adagrad": (0.9091, 0.5, 0.0909, 0.0099),
    "adam": (0.9901, 0.9091, 0.5, 0.0909),
    "yogi": (0.9901, 0.9091, 0.5, 0.0909),
}
"""First-round multiplier of an averaged update of 1e-4, 1e-3, 1e-2 and 1e-1 with the defaults."""


def first_step(settings: ServerConfig, d: float) -> float:
    """Return what the server makes of an averaged update of ``d`` in the first round."""
    strategy = ServerOptimizer(FedAvg(Setting({"x": TensorSpec((1,), "B", ("l",), 0.0)})), settings)
    state = ServerState({"x": np.zeros(1)})
    return float(strategy.apply(state, Reduced(1, {"x": np.array([d])}), 1).tensors["x"][0])


@optimizers
def test_defaults_leave_a_small_update_as_it_is(optimizer: str) -> None:
    for size in (1e-12, 1e-9, 1e-6):
        for d in (size, -size):
            assert first_step(ServerConfig(optimizer), d) / d == pytest.approx(1.0, abs=0.01)
    larger = {} if optimizer == "momentum" else {"tau": 0.1}
    for settings in (config(optimizer, learning_rate=0.0), config(optimizer, learning_rate=0.0, **larger)):
        assert first_step(settings, 1e-8) / 1e-8 == pytest.approx(1.0, abs=0.01)
    assert learning_rate(config(optimizer)) == 0.03


@optimizers
def test_what_the_defaults_make_of_larger_updates(optimizer: str) -> None:
    """The table of docs/strategies.md."""
    found = [first_step(ServerConfig(optimizer), d) / d for d in (1e-4, 1e-3, 1e-2, 1e-1)]
    assert found == pytest.approx(TABLE[optimizer], abs=6e-5)


def test_without_movement_nothing_moves() -> None:
    for optimizer in OPTIMIZERS:
        assert first_step(ServerConfig(optimizer), 0.0) == 0.0


# -- refusals, resume, planted bugs -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_strategy_that_does_not_average_in_a_fixed_basis_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"server.optimizer = 'adam': strategy '{name}' does not average in a fixed"):
        ServerOptimizer(strategy_of(name, STRATEGIES[name].methods[0]), ServerConfig("adam"))


def test_a_strategy_that_shares_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"server.optimizer = 'yogi': strategy 'local' shares no tensors"):
        ServerOptimizer(strategy_of("local", "lora"), ServerConfig("yogi"))


def test_all_others_are_accepted() -> None:
    accepted = {name for name, _, _ in AVERAGING}
    assert set(STRATEGIES) - accepted == RULES | {"local"}


def continued(strategy: Strategy, method: str, forget: Callable[[ServerState], ServerState]) -> tuple[Arrays, Arrays]:
    """Return what five rounds come to in one go, and with a new server after three."""

    def server(state: ServerState | None = None) -> FlowerStrategy:
        return server_of(strategy, method, state, clients_per_round=3, dtype="float32")

    def go(one: FlowerStrategy, rounds: int, completed: int = 0) -> Arrays:
        return run(one, LoopGrid({1: node_of(one), 2: node_of(one)}), rounds, completed)

    first = server()
    go(first, 3)
    return go(server(), 5), go(server(forget(saved(first.state))), 5, 3)


@optimizers
@pytest.mark.parametrize(("name", "method"), [("fedavg", "lora"), ("rolora", "lora"), ("s2-lora", "s2-lora")])
def test_a_resumed_server_goes_on_to_the_same_bits(name: str, method: str, optimizer: str) -> None:
    strategy = ServerOptimizer(strategy_of(name, method), config(optimizer))
    whole, resumed = continued(strategy, method, lambda state: state)
    assert whole.keys() == resumed.keys()
    assert all(np.array_equal(resumed[key], value) for key, value in whole.items())


@optimizers
@pytest.mark.parametrize("what", ["m", "v", "t"])
def test_planted_moments_that_are_not_restored(optimizer: str, what: str) -> None:
    """Each part of the state that a formula reads changes what comes after, if it is lost."""

    def forget(state: ServerState) -> ServerState:
        return replace(state, extra={key: v for key, v in state.extra.items() if not key.startswith(f"{what}/")})

    strategy = ServerOptimizer(strategy_of("fedavg", "lora"), config(optimizer))
    whole, resumed = continued(strategy, "lora", forget)
    read = {"momentum": "m", "adagrad": "v", "adam": "mvt", "yogi": "mv"}[optimizer]
    off = max(float(np.abs(resumed[key] - value).max()) for key, value in whole.items())
    assert off > 1e-4 if what in read else off == 0


def test_planted_second_moment_of_the_first_moment() -> None:
    """OpenFedLLM squares m where the formula squares d: no small difference."""

    ended = []
    for slow in (Slow(config("adam")), SecondMomentOfTheFirst(config("adam"))):
        held = np.zeros(6)
        for number in range(1, 4):
            held = slow.step("x", held, held + np.random.default_rng(number).standard_normal(6))
        ended.append(held)
    assert np.abs(ended[0] - ended[1]).max() > 1e-2


@pytest.mark.parametrize("outer", [True, False])
def test_what_the_inner_strategy_keeps_stays_its_own(outer: bool) -> None:
    """Inside SCAFFOLD or around it: variates are renewed, and moments kept."""
    plain = strategy_of("fedavg", "lora")
    optimizer = config("adam")
    if outer:
        strategy: Strategy = ServerOptimizer(Scaffold(plain, 5, 2), optimizer)
    else:
        strategy = Scaffold(ServerOptimizer(plain, optimizer), 5, 2)
    server = server_of(strategy, "lora")
    run(server, LoopGrid({1: node_of(server)}), 3)
    assert all(np.abs(value).max() > 1e-3 for value in server.state.named("variate").values())
    assert all(value[0] == 3 for value in server.state.named("t").values())
    assert (
        server.state.named("variate").keys() == server.state.named("m").keys() == plain.with_role(1, Role.SHARED).keys()
    )
