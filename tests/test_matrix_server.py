"""What every strategy must hold on the server, for equal ranks and for ranks by client: see matrix.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedlora.methods import initial_tensors
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.server import FlowerStrategy, lacking
from fedlora.server.traffic import Traffic
from fedlora.strategy import Strategy
from fedlora.wire import from_named_arrays, read_instruction
from strategies import STRATEGIES
from tests.support.federation import (
    RAGGED,
    kept_by_clients,
    one_round,
    random_state,
    run,
    saved,
    seeded_of,
    server_of,
    servers,
    strategy_of,
    updates,
)
from tests.support.formulas import BYTES, LAYERS
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import CASES, cycle, method_of

cases = pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])
Ranks = tuple[int, ...]


@pytest.mark.parametrize("weights", ["examples", "equal"])
@servers
def test_mean_of_updates(name: str, method: str, ranks: Ranks, weights: str) -> None:
    """Whether the server's Delta W is the weighted mean of the clients' is what the strategy says it is."""
    off = 0.0
    strategy = strategy_of(name, method, ranks)
    for number in cycle(strategy):
        state = random_state(strategy, number)
        held = {**seeded_of(method), **state.tensors}
        server = server_of(strategy, method, state, weights=weights)
        ended = one_round(server, LoopGrid({1: node_of(server), 2: node_of(server)}), number)
        if strategy.exact is None:
            assert not set(method_of(method).specs()) <= {*ended, "head.weight", "head.bias"}
            return
        shares = np.array([examples_of(k) if weights == "examples" else 1 for k in range(5)], dtype=float)
        shares /= shares.sum()
        clients = [updates(method, {**held, **update_of(k, number, strategy.expected(number, k))}) for k in range(5)]
        for layer, update in updates(method, {**held, **ended}).items():
            mean = sum(share * client[layer] for share, client in zip(shares, clients, strict=True))
            off = max(off, float(np.linalg.norm(update - mean) / np.linalg.norm(mean)))
    if strategy.exact:
        assert off < 1e-13
    elif name == "florist":
        assert 1e-13 < off < 0.1, "a hundredth of the energy is left out at most"
    else:
        assert off > 0.1, "averaging factors apart is a real error, not rounding"


@servers
def test_same_bits_in_any_order_of_clients_and_replies(name: str, method: str, ranks: Ranks) -> None:
    results = []
    for nodes in ({1: 0}, {1: 0, 2: 0, 3: 0}, dict.fromkeys(range(10, 15), 0)):
        for order in (list, lambda replies: replies[::-1]):
            server = server_of(strategy_of(name, method, ranks), method, dtype="float32", learning_rate=0.1)
            results.append(run(server, LoopGrid(dict.fromkeys(nodes, node_of(server)), order), 3))
    assert all(results[0].keys() == other.keys() for other in results)
    assert all(np.array_equal(results[0][key], other[key]) for other in results for key in other)
    assert all(value.dtype == np.float32 for value in results[0].values())


@servers
def test_weights_count(name: str, method: str, ranks: Ranks) -> None:
    """Examples as weights give another mean than equal ones, whatever is exchanged; hetlora weighs factors by norms."""
    strategy = strategy_of(name, method, ranks)
    ended = []
    for weights in ("examples", "equal"):
        server = server_of(strategy, method, weights=weights)
        ended.append(run(server, LoopGrid({1: node_of(server)}), 1))
    one, two = ended
    for key, spec in strategy.with_role(1, Role.SHARED).items():
        by_norm = name == "hetlora" and spec.kind != "head"
        assert np.array_equal(one[key], two[key]) if by_norm else np.abs(one[key] - two[key]).max() > 1e-3
    pairs = [(updates(method, {**seeded_of(method), **end})) for end in ended] if strategy.accumulates else []
    assert all(np.abs(pairs[0][layer] - pairs[1][layer]).max() > 1e-3 for layer in (pairs[0] if pairs else ()))


@servers
def test_identical_clients_leave_the_model_as_it_is(name: str, method: str, ranks: Ranks) -> None:
    """Clients that send what they were sent: Delta W stays; a proximal step shrinks it by its threshold, no more.

    With zero-padding, hetlora and flexlora at one rank for all: clients that lack a rank pull it towards zero
    (test_zero_padding.py), and have lost what was in it.
    """
    strategy = strategy_of(name, method, () if name in ("zero-padding", "hetlora", "flexlora") else ranks)
    for number in cycle(strategy):
        for rate in (0.0, 0.5):
            state = random_state(strategy, number)
            server = server_of(strategy, method, state, learning_rate=rate)
            expected = {**seeded_of(method), **state.tensors}
            ended = one_round(server, LoopGrid({1: node_of(server, same=expected)}), number)
            for key, spec in strategy.expected(number).items():
                if spec.l1:
                    shrunk = np.abs(expected[key]) - rate * spec.l1
                    expected[key] = np.sign(expected[key]) * np.maximum(shrunk, 0)
            after = updates(method, {**seeded_of(method), **state.tensors, **ended})
            for layer, update in updates(method, expected).items():
                assert np.abs(after[layer] - update).max() < 1e-12 * max(1.0, np.abs(update).max())


@servers
def test_a_resumed_server_goes_on_to_the_same_bits(name: str, method: str, ranks: Ranks) -> None:
    """Three rounds, a new server with what a checkpoint holds, two more: tensors and bytes as without the break."""
    strategy = strategy_of(name, method, ranks)

    def go(server: FlowerStrategy, rounds: int, completed: int = 0) -> tuple[Arrays, list[Any]]:
        grid = LoopGrid({1: node_of(server), 2: node_of(server)})
        result = server.start(grid, server.arrays, num_rounds=rounds, completed=completed)
        assert result.arrays is not None
        return from_named_arrays(result.arrays), [dict(m) for m in result.train_metrics_clientapp.values()]

    settings = {"clients_per_round": 3, "learning_rate": 0.1}
    expected, lines = go(server_of(strategy, method, **settings), 5)
    first = server_of(strategy, method, **settings)
    go(first, 3)
    ended, rest = go(server_of(strategy, method, saved(first.state), **settings), 5, completed=3)
    assert rest == lines[3:]
    assert ended.keys() == expected.keys()
    assert all(np.array_equal(ended[key], expected[key]) for key in expected)


@cases
def test_bytes_are_theory(name: str, method: str) -> None:
    """Over the second cycle of rounds, all clients taking part: elements times eight, up, down, and down if kept."""
    strategy = strategy_of(name, method, head=Role.FROZEN)
    server = server_of(strategy, method)
    traffic: list[Traffic] = []

    def note(number: int, _result: Any) -> None:
        if number:
            assert server.replies is not None
            traffic.append(server.replies.traffic)

    server.start(LoopGrid({1: node_of(server)}), server.arrays, num_rounds=2 * strategy.period, on_round=note)
    later = traffic[strategy.period :]
    up, down, cached = BYTES[name, method]
    if strategy.accumulates:  # round 2 sends what round 1 has added: more ranks than any layer has features
        most = server.core.ranks[1] if name == "florist" else [15] * len(LAYERS)  # the former depends on the numbers
        held = ((layer, min(layer.d_in, layer.d_out, rank)) for layer, rank in zip(LAYERS, most, strict=True))
        grown = sum(rank * (layer.d_in + layer.d_out) for layer, rank in held)
        down, cached = down + grown, cached + grown
    clients, personal = 5, 2 if strategy.has_personal else 1  # to evaluate they are sent the tensors once more
    assert sum(one.bytes_up for one in later) / len(later) == pytest.approx(8 * clients * up)
    assert sum(one.bytes_down for one in later) / len(later) == pytest.approx(8 * clients * down * personal)
    assert sum(one.bytes_down_cached for one in later) / len(later) == pytest.approx(8 * clients * cached)


@servers
def test_bytes_of_ranks_by_client(name: str, method: str, ranks: Ranks) -> None:
    """What a round of all clients takes is the sum over clients of tensors at their own ranks."""
    strategy = strategy_of(name, method, ranks, head=Role.FROZEN)
    server = server_of(strategy, method)
    run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 1)
    assert server.replies is not None
    per_rank = sum(layer.d_in + layer.d_out for layer in LAYERS)
    if ranks:
        up = 0 if name == "local" else 8 * sum(ranks) * per_rank
        assert server.replies.traffic.bytes_up == up
        whole = 8 * sum(3 if strategy.folds else rank for rank in ranks) * per_rank
        sends = name in ("zero-padding", "hetlora", "flexlora", "fed-plora", "lora-lego")
        assert server.replies.traffic.bytes_down == (whole if sends else 0)
    else:
        assert server.replies.traffic.bytes_up == 5 * server.payloads.up(1)


@cases
def test_what_a_client_lacks_is_all_that_changed_since(name: str, method: str) -> None:
    """However long ago it took part: one cycle of rounds holds what all rounds since have changed."""
    strategy = strategy_of(name, method)
    for number in range(1, 9):
        for received in range(-1, number):
            changed = set().union(*(strategy.changed(between) for between in range(received + 1, number)))
            lacked = {spec.kind for spec in lacking(strategy, number, received).values()}
            assert lacked == changed & {spec.kind for spec in strategy.sent(number).values()}


def spoiled(kind: str, value: NDArray[Any]) -> NDArray[Any]:
    first = np.arange(value.size).reshape(value.shape) == 0
    match kind:
        case "nan":
            return np.where(first, np.nan, value)
        case "huge":
            return np.where(first, 1e15, value)
        case "shape":
            return value[:-1]
        case "dtype":
            return value.astype(np.float32)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["nan", "huge", "shape", "dtype"])
@servers
def test_garbage_is_refused_whatever_tensor_holds_it(name: str, method: str, ranks: Ranks, kind: str) -> None:
    """Whatever kind of tensor: of each kind the last that is sent."""
    strategy = strategy_of(name, method, ranks)
    for tensor in {spec.kind: tensor for tensor, spec in strategy.expected(1, 2).items()}.values():
        server = server_of(strategy, method)

        def spoil(client: int, update: Arrays, tensor: str = tensor) -> Arrays:
            return {**update, tensor: spoiled(kind, update[tensor])} if client == 2 else update

        run(server, LoopGrid({k: node_of(server, spoil) for k in range(1, 6)}), 1)
        assert server.replies is not None
        assert list(server.replies.refused) == [2]
        assert tensor in server.replies.refused[2]
        assert server.replies.total.count == 4


@pytest.mark.parametrize("name", [name for name in STRATEGIES if STRATEGIES[name].ragged and name != "local"])
def test_a_tensor_of_another_clients_rank_is_refused(name: str) -> None:
    strategy = strategy_of(name, "lora", RAGGED)
    server = server_of(strategy, "lora")

    def spoil(client: int, update: Arrays) -> Arrays:
        return update_of(client, 1, strategy.expected(1, 1)) if client == 2 else update

    run(server, LoopGrid({k: node_of(server, spoil) for k in range(1, 6)}), 1)
    assert server.replies is not None
    assert "has shape [3, 6], not [2, 6]" in server.replies.refused[2]


@servers
def test_personal_and_frozen_tensors_never_cross_the_wire(name: str, method: str, ranks: Ranks) -> None:
    """Not in any message, down or up, of training or evaluation; and one that comes all the same is refused."""
    strategy = strategy_of(name, method, ranks)
    server, specs = server_of(strategy, method, clients=2), method_of(method).specs()
    grid = LoopGrid({1: node_of(server)})
    run(server, grid, 2 * strategy.period)
    stacked = strategy.accumulated([1] * len(LAYERS))
    for message in grid.sent:
        instruction = read_instruction(message.content)
        kept = {k for k, role in instruction.roles.items() if role in (Role.PERSONAL, Role.FROZEN, Role.UPLOAD)}
        assert not {specs[key].kind for key in instruction.tensors if key not in stacked} & kept
        assert instruction.extra == {}
    kept = kept_by_clients(strategy, 1)
    leaked = next((key for key, spec in specs.items() if spec.kind in kept), None)
    if leaked is None:
        assert strategy.sent(1).keys() | strategy.expected(1).keys() == specs.keys()
        return
    server = server_of(strategy, method, clients=2)

    def leak(client: int, update: Arrays) -> Arrays:
        return {**update, leaked: np.zeros(specs[leaked].shape)} if client == 0 else update

    run(server, LoopGrid({1: node_of(server, leak), 2: node_of(server)}), 1)
    assert server.replies is not None
    assert f"{leaked} is not expected" in server.replies.refused[0]
    assert 1 not in server.replies.refused


@cases
def test_clients_of_different_ranks_need_a_strategy_for_them(name: str, method: str) -> None:
    if STRATEGIES[name].ragged:
        assert isinstance(strategy_of(name, method, (1,) * 5), Strategy)
        return
    with pytest.raises(ValueError, match=r"method.ranks: strategy .* needs one rank for all clients; leave it empty"):
        strategy_of(name, method, (1,) * 5)


@pytest.mark.parametrize(("name", "method"), [("flora", "lora"), ("ravan", "ravan"), ("fedavg", "lora")])
def test_a_client_that_changes_nothing_has_changed_nothing(name: str, method: str) -> None:
    """``federation.max-change`` counts from what a client starts with: for what starts anew, from the round's draw."""
    strategy = strategy_of(name, method)
    server = server_of(strategy, method, deployed=True, max_change=1e-3)
    fresh = {key: spec for key, spec in strategy.expected(1).items() if key not in strategy.sent(1)}
    start = {**seeded_of(method), **initial_tensors(fresh, Seeded(0), "float64", 1)}

    def spoil(client: int, update: Arrays) -> Arrays:
        return {key: value + (client == 4) for key, value in update.items()}

    run(server, LoopGrid({k: node_of(server, spoil, same=start) for k in range(1, 6)}), 1)
    assert server.replies is not None
    assert list(server.replies.refused) == [4]
    assert "federation.max-change" in server.replies.refused[4]
