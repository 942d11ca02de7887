"""Terms of local training at the server: SCAFFOLD's variates, FedProx, the schedule over rounds, and their mix."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedlora.config import Config, LocalConfig, ServerConfig, StrategyConfig, TrainConfig
from fedlora.local_terms import LocalTerms
from fedlora.roles import Role
from fedlora.server import FlowerStrategy
from fedlora.strategy import Strategy
from fedlora.wire import decode, encode, read_instruction
from strategies.build import build_strategy
from strategies.fedprox import FedProx
from strategies.round_schedule import RoundSchedule, share_of_peak
from strategies.scaffold import Scaffold
from strategies.server_optimizers import ServerOptimizer
from tests.support.federation import run, saved, server_of, strategy_of
from tests.support.formulas import LAYERS
from tests.support.loop import Arrays, LoopGrid, Node, node_of, update_of
from tests.support.matrix import CONFIGS, method_of


def scaffold(name: str = "fedavg", method: str = "lora", **changes: Any) -> Scaffold:
    return Scaffold(strategy_of(name, method, **changes), num_clients=5, option=2)


# -- SCAFFOLD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["examples", "equal"])
@pytest.mark.parametrize(("name", "method"), [("fedavg", "lora"), ("rolora", "lora"), ("fedavg", "mos")])
def test_variates_follow_the_formula(name: str, method: str, weights: Any) -> None:
    """c <- c + |S| / N mean of the changes, all clients alike whatever the weights of their updates."""
    strategy = scaffold(name, method)
    server = server_of(strategy, method, clients_per_round=3, weights=weights)
    expected: Arrays = {key: np.zeros_like(value) for key, value in server.state.extra.items()}
    for number in range(1, 5):
        cohort = server.federation.cohort(number)
        changes = [update_of(k, 100 + number, strategy.extra(number)) for k in cohort]
        for key in strategy.extra(number):
            expected[key] = expected[key] + 3 / 5 * np.mean([change[key] for change in changes], axis=0)
    ended = run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 4)
    assert server.state.extra.keys() == expected.keys()
    assert all(np.abs(server.state.extra[key] - value).max() < 1e-13 for key, value in expected.items())
    plain = server_of(strategy.inner, method, clients_per_round=3, weights=weights)
    same = run(plain, LoopGrid({1: node_of(plain), 2: node_of(plain)}), 4)
    assert all(np.array_equal(ended[key], value) for key, value in same.items()), "the mean is the inner strategy's"


def test_clients_that_failed_are_not_of_the_cohort() -> None:
    server = server_of(scaffold(), "lora")
    grid = LoopGrid({**{k + 1: node_of(server) for k in range(4)}, 5: lambda _message: None})
    run(server, grid, 1)
    changes = [update_of(k, 101, server.strategy.extra(1)) for k in range(4)]
    for key, value in server.state.extra.items():
        assert np.abs(value - 4 / 5 * np.mean([change[key] for change in changes], axis=0)).max() < 1e-13


def test_clients_are_sent_the_servers_variates_of_what_is_shared() -> None:
    """RoLoRA: B's in odd rounds, A's in even ones, the head's in all; nothing of it to evaluate."""
    server = server_of(scaffold("rolora", head=Role.PERSONAL), "lora")
    grid = LoopGrid({1: node_of(server)})
    before: list[Arrays] = [dict(server.state.extra)]
    server.start(grid, server.arrays, num_rounds=3, on_round=lambda n, _: before.append(dict(server.state.extra)))
    train = [m for m in grid.sent if m.metadata.message_type == "train"]
    for number, message in enumerate(train, 1):
        extra, factor = read_instruction(message.content).extra, "AB"[number % 2]
        assert set(extra) == {f"variate/{layer.name}.lora_{factor}" for layer in LAYERS}
        assert all(np.array_equal(value, before[number][key]) for key, value in extra.items())
    assert all(read_instruction(m.content).extra == {} for m in grid.sent if m.metadata.message_type == "evaluate")


def test_variates_double_the_bytes() -> None:
    """Up and down once a client; one that keeps what it was sent lacks them from the second round on."""
    server = server_of(scaffold(head=Role.FROZEN), "lora")
    seen: list[dict[str, int]] = []
    server.start(
        LoopGrid({1: node_of(server)}),
        server.arrays,
        num_rounds=2,
        on_round=lambda number, _: (
            seen.append(dict(vars(server.replies.traffic))) if number and server.replies else None
        ),
    )
    one = 8 * sum(3 * (layer.d_in + layer.d_out) for layer in LAYERS)
    names = ("bytes_up", "bytes_down", "bytes_down_cached")
    assert [seen[0][name] for name in names] == [5 * 2 * one, 5 * 2 * one, 0]
    assert [seen[1][name] for name in names] == [5 * 2 * one, 5 * 2 * one, 5 * 2 * one]
    assert server.payloads.cycle() == (2 * one, 2 * one, 2 * one)
    assert seen[0]["message_bytes_down"] > 2 * one, "Flower carries both to the node"


def test_a_variate_that_is_still_zero_is_not_lacked() -> None:
    """RoLoRA's second round sends A's variates for the first time; its third sends B's, which the first changed."""
    server = server_of(scaffold("rolora", head=Role.FROZEN), "lora")
    a, b = (8 * sum(3 * size for size in sizes) for sizes in zip(*((n.d_in, n.d_out) for n in LAYERS), strict=True))
    assert server.payloads.down(2, 0) == (a + b + a, b)
    assert server.payloads.down(3, 1) == (a + b + b, a + b)


def spoiled(server: FlowerStrategy, change: Callable[[Arrays], Arrays | None]) -> Node:
    """A node whose client sends other variates than it should."""
    node = node_of(server)

    def answer(message: Message) -> RecordDict:
        content = node(message)
        assert isinstance(content, RecordDict)
        changed = change(decode(content["reduced.extra"]))
        if changed is None:
            del content["reduced.extra"]
        else:
            content["reduced.extra"] = encode(changed)
        return content

    return answer


KEY = "variate/m.0.q.lora_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda extra: None, "variate/.* is missing"),
        (lambda extra: {key: value for key, value in extra.items() if key != KEY}, f"{KEY} is missing"),
        (lambda extra: {**extra, "variate/x": np.zeros(1)}, "variate/x is not expected"),
        (lambda extra: {**extra, KEY: extra[KEY].T.copy()}, f"{KEY} has shape"),
        (lambda extra: {**extra, KEY: extra[KEY].astype(np.float32)}, f"{KEY} has dtype float32"),
        (lambda extra: {**extra, KEY: extra[KEY] * np.nan}, f"{KEY} holds NaN"),
        (lambda extra: {**extra, KEY: extra[KEY] * 1e15}, f"the weighted sum of {KEY} passed"),
    ],
    ids=["none", "one less", "one more", "shape", "dtype", "nan", "huge"],
)
def test_wrong_variates_are_refused(change: Callable[[Arrays], Arrays | None], message: str) -> None:
    server = server_of(scaffold(), "lora")
    run(server, LoopGrid({**{k: node_of(server) for k in range(1, 5)}, 5: spoiled(server, change)}), 1)
    assert server.replies is not None
    assert list(server.replies.refused) == [4]
    assert re.search(message, server.replies.refused[4])
    assert server.replies.total.count == 4


def test_same_bits_in_any_order_and_after_a_resume() -> None:
    ended = []
    for nodes, order in ((1, list), (3, lambda replies: replies[::-1]), (5, list)):
        server = server_of(scaffold(), "lora", dtype="float32", clients_per_round=3)
        run(server, LoopGrid({k: node_of(server) for k in range(nodes)}, order), 3)
        ended.append(server)
    resumed = server_of(scaffold(), "lora", saved(ended[0].state), dtype="float32", clients_per_round=3)
    for server in (*ended[1:], resumed):
        run(server, LoopGrid({1: node_of(server)}), 5, completed=3)
    states = [server.state.arrays() for server in (*ended[1:], resumed)]
    assert all(one.keys() == states[0].keys() for one in states)
    assert all(np.array_equal(one[key], states[0][key]) for one in states for key in one)


@pytest.mark.parametrize(
    ("name", "ranks", "reason"),
    [
        ("fedsvd", (), "does not average in a fixed basis at one rank"),
        ("flora", (), "does not average in a fixed basis at one rank"),
        ("fedrot-lora", (), "does not average in a fixed basis at one rank"),
        ("hetlora", (), "does not average in a fixed basis at one rank"),
        ("fed-plora", (), "does not average in a fixed basis at one rank"),
        ("zero-padding", (1, 2, 3, 1, 2), "does not average in a fixed basis at one rank"),
        ("local", (), "shares no tensors"),
    ],
)
def test_strategies_whose_variates_mean_nothing_are_refused(name: str, ranks: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"local.term = 'scaffold': strategy '{name}' {reason}"):
        Scaffold(strategy_of(name, "lora", ranks), 5, 2)


def test_proximal_steps_are_no_gradients() -> None:
    """S2-LoRA's soft threshold would end up in the variates."""
    with pytest.raises(ValueError, match=r"'s2-lora' takes proximal steps on what it averages"):
        Scaffold(strategy_of("s2-lora", "s2-lora"), 5, 2)


# -- FedProx, the schedule, their mix -----------------------------------------------------------------


def test_fedprox_asks_for_its_term_and_changes_nothing_else() -> None:
    inner = strategy_of("fedavg", "lora")
    strategy = FedProx(inner, 0.3)
    assert strategy.local(1) == LocalTerms(proximal=0.3)
    ended = []
    for one in (inner, strategy):
        server = server_of(one, "lora")
        ended.append(run(server, LoopGrid({1: node_of(server)}), 2))
    assert all(np.array_equal(ended[0][key], value) for key, value in ended[1].items())
    with pytest.raises(ValueError, match=r"local.term = 'prox': strategy 'local' shares no tensors"):
        FedProx(strategy_of("local", "lora"), 0.3)


def test_shares_of_the_peak_learning_rate_by_hand() -> None:
    """Ten rounds, two of warm-up: up to 1 in round 2, from round 3 down to where round 11 would be 0."""
    by_hand = {
        "constant": [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "linear": [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        "cosine": [0.5, 1, *((1 + math.cos(math.pi * n / 8)) / 2 for n in range(8))],
    }
    for schedule, shares in by_hand.items():
        assert [share_of_peak(n, 10, schedule, 2) for n in range(1, 11)] == pytest.approx(shares, abs=1e-15)
    assert share_of_peak(7, 10, "cosine", 2) == pytest.approx(0.5)
    assert [share_of_peak(n, 4, "linear", 0) for n in range(1, 5)] == [1, 0.75, 0.5, 0.25]
    assert [share_of_peak(n, 3, "linear", 3) for n in range(1, 4)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [share_of_peak(n, 2, "cosine", 4) for n in (1, 2)] == [0.25, 0.5]


def test_after_the_last_round_its_learning_rate_stays() -> None:
    """Clients that evaluate themselves after it are sent terms, too."""
    strategy = RoundSchedule(strategy_of("fedavg", "lora"), 4, "linear", 0)
    assert strategy.local(5) == strategy.local(4) == LocalTerms(learning_rate=0.25)


def test_the_servers_proximal_step_follows_the_schedule() -> None:
    ended = []
    for rate, schedule in ((8.0, "linear"), (6.0, "constant")):  # in round 2 of 4: three quarters of the peak
        strategy = RoundSchedule(strategy_of("s2-frozen", "s2-lora"), 4, schedule, 0)
        server = server_of(strategy, "s2-lora", learning_rate=rate)
        messages = server.configure_train(2, server.arrays, Any, grid := LoopGrid({1: node_of(server)}))  # type: ignore[arg-type]
        server.aggregate_train(2, list(grid.pull_messages(grid.push_messages(messages))))
        ended.append(server.state.tensors)
    assert all(np.allclose(ended[0][key], value, atol=1e-15) for key, value in ended[1].items())
    assert any((value == 0).any() for value in ended[0].values()), "control: the step makes zeros"


WRAPPERS: dict[str, Callable[[Strategy], Strategy]] = {
    "prox": lambda inner: FedProx(inner, 0.1),
    "scaffold": lambda inner: Scaffold(inner, 5, 1),
    "schedule": lambda inner: RoundSchedule(inner, 6, "linear", 1),
    "optimizer": lambda inner: ServerOptimizer(inner, ServerConfig("adam")),
}


def test_the_order_of_wrapping_does_not_matter() -> None:
    """Each asks for its own term; the state after four rounds is the same to the bit."""
    terms, states = set(), []
    for order in itertools.permutations(WRAPPERS):
        strategy = strategy_of("rolora", "lora")
        for name in order:
            strategy = WRAPPERS[name](strategy)
        terms.add(tuple(strategy.local(number) for number in range(1, 7)))
        server = server_of(strategy, "lora")
        run(server, LoopGrid({1: node_of(server)}), 4)
        states.append(server.state.arrays())
    assert len(terms) == 1
    assert terms.pop()[2] == LocalTerms(learning_rate=0.8, proximal=0.1, scaffold=1)
    assert all(one.keys() == states[0].keys() for one in states)
    assert all(np.array_equal(one[key], states[0][key]) for one in states for key in one)


def test_instructions_carry_the_terms() -> None:
    strategy = WRAPPERS["schedule"](WRAPPERS["scaffold"](WRAPPERS["prox"](strategy_of("fedavg", "lora"))))
    server = server_of(strategy, "lora")
    grid = LoopGrid({1: node_of(server)})
    run(server, grid, 3)
    assert [read_instruction(message.content).local for message in grid.sent] == [strategy.local(n) for n in (1, 2, 3)]


def test_a_configuration_becomes_its_strategy() -> None:
    plain = Config(strategy=StrategyConfig("fedavg"), method=CONFIGS["lora"].method, rounds=4)
    specs = method_of("lora").specs()
    assert type(build_strategy(plain, specs)).__name__ == "FedAvg"
    for changes, terms in (
        ({"local": LocalConfig("prox", mu=0.2)}, LocalTerms(proximal=0.2)),
        ({"local": LocalConfig("scaffold", option=1), "train": TrainConfig(optimizer="sgd")}, LocalTerms(scaffold=1)),
        ({"train": TrainConfig(round_schedule="linear")}, LocalTerms(learning_rate=0.75)),
        ({"train": TrainConfig(warmup_rounds=4)}, LocalTerms(learning_rate=0.5)),
        ({"server": ServerConfig("yogi")}, LocalTerms()),
    ):
        strategy = build_strategy(Config(**{**vars(plain), **changes}), specs)
        assert strategy.local(2) == terms
        assert strategy.name == "fedavg"
    assert isinstance(strategy, ServerOptimizer)
