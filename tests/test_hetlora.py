"""HetLoRA: weights by norms and pruned ranks, against whole matrices in float64, with wrong rules planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import Config
from fedlora.exchange import ClientReport, Update
from fedlora.local_terms import LocalTerms, tail
from fedlora.methods.products import pairs, product_norm
from fedlora.reduce import ClientUpdate, Reduced
from fedlora.roles import Role
from fedlora.server import FlowerStrategy
from fedlora.server.observers.records import client_line
from fedlora.shapes import at_rank, cut
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.wire import Reply, from_named_arrays, read_instruction
from simulations.trainers import TrainerEvaluator
from strategies import HetLoRA, HetLoraOptions
from strategies.fedprox import FedProx
from tests.support.federation import one_round, run, saved, seeded_of, server_of, strategy_of
from tests.support.formulas import LAYERS as MATRIX_LAYERS
from tests.support.loop import Arrays, LoopGrid, Node, answer, examples_of, node_of, update_of
from tests.support.plans import plan, shown
from tests.test_product_rules import RANK, RANKS, SPECS, WEIGHTS, normal, off, reduced, setting, start_of

HALF = HetLoraOptions(decay=0.5)
FACTORS = [name for _, a, b in pairs(SPECS) for name in (a, b)]


@pytest.mark.parametrize("rank", [1, 3, 9, 40])
def test_the_norm_of_a_product_is_that_of_the_whole_matrix(rank: int) -> None:
    for a, b in (
        (normal(rank, shape=(rank, 12)), normal(rank, 1, shape=(5, rank))),
        (normal(rank, shape=(rank, 5)), normal(rank, 1, shape=(12, rank))),
    ):
        assert product_norm(a, b) == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-12)
        assert product_norm(a, 0 * b) == 0.0


@pytest.mark.parametrize(
    ("rank", "decay", "first"), [(100, 0.29, 29), (8, 0.99, 7), (1, 0.5, 1), (5, 0.5, 2), (3, 1.0, 3)]
)
def test_where_the_last_ranks_begin(rank: int, decay: float, first: int) -> None:
    assert tail(rank, decay) == first


# -- the server's mean --------------------------------------------------------------------------------


def whole(tensors: Any) -> Any:
    """Return the products of all layers, [d_out, d_in] each, in one row."""
    return np.concatenate([(tensors[b] @ tensors[a]).ravel() for _, a, b in pairs(SPECS)])


def by_norm(found: Sequence[ClientUpdate]) -> Any:
    norms = np.array([np.linalg.norm(whole(one.tensors)) for one in found])
    return norms / norms.sum()


def padded_mean(found: Sequence[ClientUpdate], shares: Any) -> Arrays:
    """Return the means of factors with zeros for the ranks that a client lacks."""
    mean = {name: np.zeros(SPECS[name].shape) for name in FACTORS}
    for share, one in zip(shares, found, strict=True):
        for name in FACTORS:
            value = one.tensors[name]
            mean[name][tuple(slice(n) for n in value.shape)] += share * value
    return mean


def off_by(strategy: HetLoRA, found: Reduced, expected: Arrays) -> float:
    tensors = strategy.apply(start_of(strategy), found, 1).tensors
    return max(off(tensors[name], expected[name]) for name in FACTORS)


@pytest.mark.parametrize("ranks", [(), RANKS])
def test_padded_with_zeros_and_averaged_by_the_norms_of_whole_matrices(ranks: tuple[int, ...]) -> None:
    strategy = HetLoRA(setting(ranks=ranks))
    found = reduced(strategy)
    shares = by_norm(found.updates)
    assert np.abs(shares - WEIGHTS / WEIGHTS.sum()).max() > 0.1, "control: examples are other weights"
    expected = padded_mean(found.updates, shares)
    assert off_by(strategy, found, expected) < 1e-12
    if ranks:  # averaged over those that hold a rank, each number would be larger
        mean = {name: value.copy() for name, value in expected.items()}
        for rank in range(RANK):
            held = sum(share for share, own in zip(shares, ranks, strict=True) if own > rank)
            for _, a, b in pairs(SPECS):
                mean[a][rank], mean[b][:, rank] = mean[a][rank] / held, mean[b][:, rank] / held
        assert off_by(strategy, found, mean) > 0.1


def test_planted_weights_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with whole matrices sees them."""
    strategy = HetLoRA(setting(ranks=RANKS))
    found = reduced(strategy)
    monkeypatch.setattr(HetLoRA, "_shares", lambda _self, _updates: WEIGHTS / WEIGHTS.sum())
    assert off_by(strategy, found, padded_mean(found.updates, by_norm(found.updates))) > 0.1


def test_clients_whose_products_are_all_zero_count_as_in_fedavg() -> None:
    """Where no client has moved B; one that has takes all the weight."""
    strategy = HetLoRA(setting())

    def still(client: int, tensors: dict[str, Any]) -> None:
        for _, _, b in pairs(SPECS):
            tensors[b] = 0 * tensors[b]

    found = reduced(strategy, change=still)
    expected = padded_mean(found.updates, WEIGHTS / WEIGHTS.sum())
    tensors = strategy.apply(start_of(strategy), found, 1).tensors
    assert all(np.abs(tensors[name] - expected[name]).max() < 1e-12 for name in FACTORS)
    one = reduced(strategy, change=lambda client, tensors: None if client == 1 else still(client, tensors))
    assert off_by(strategy, one, dict(one.updates[1].tensors)) < 1e-12


def test_heads_are_averaged_by_examples() -> None:
    strategy = strategy_of("hetlora", "lora", (1, 3))
    server = server_of(strategy, "lora", clients=2)
    ended = run(server, LoopGrid({1: node_of(server)}), 1)
    own = [update_of(k, 1, strategy.expected(1, k))["head.weight"] for k in range(2)]
    rows = np.array([examples_of(0), examples_of(1)])
    assert np.allclose(ended["head.weight"], sum(n * one for n, one in zip(rows, own, strict=True)) / rows.sum())


# -- pruning ------------------------------------------------------------------------------------------


def random_start(strategy: HetLoRA) -> ServerState:
    state = start_of(strategy)
    return replace(state, tensors={name: normal(7, at, shape=SPECS[name].shape) for at, name in enumerate(FACTORS)})


def moved(strategy: HetLoRA, state: ServerState, factors: dict[int, float]) -> Reduced:
    """Return updates of some clients: what they were sent, its last ranks times a factor."""
    updates = []
    for client, factor in factors.items():
        tensors = {}
        for name, spec in strategy.expected(1, client).items():
            value = state.tensors[name][tuple(slice(n) for n in spec.shape)].copy()
            rank = strategy.setting.ranks[client]
            last = (slice(tail(rank, 0.5), None),) if spec.kind == "A" else (slice(None), slice(tail(rank, 0.5), None))
            value[last] *= factor
            tensors[name] = value
        updates.append(ClientUpdate(client, 1, tensors))
    return Reduced(len(updates), updates=tuple(updates))


@pytest.mark.parametrize(
    ("ranks", "factors", "after"),
    [
        ((1, 4, 2), {0: 0.5, 1: 0.5, 2: 0.5}, (1, 2, 1)),  # the smallest rank is the least
        ((2, 4, 3), {0: 0.5, 1: 0.5, 2: 0.5}, (2, 2, 2)),  # 3 would be pruned to 1
        ((1, 4, 2), {0: 2.0, 1: 2.0, 2: 0.5}, (1, 4, 1)),  # a score that rose
        ((1, 4, 2), {0: 1.0, 1: 1.0, 2: 1.0}, (1, 4, 2)),  # or stayed
        ((1, 4, 2), {1: 0.5}, (1, 2, 2)),  # clients that were not there
        ((4, 4, 4), {0: 0.5, 1: 0.5, 2: 0.5}, (4, 4, 4)),
    ],
)
def test_ranks_fall_where_the_score_fell(
    ranks: tuple[int, ...], factors: dict[int, float], after: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = HetLoRA(setting(HALF, ranks=ranks))
    state = random_start(strategy)
    ended = strategy.apply(state, moved(strategy, state, factors), 1)
    assert strategy.ranks(ended) == strategy.at(ended).setting.ranks == after
    assert strategy.setting.ranks == ranks, "the strategy itself has not changed"
    # Planted: ranks that fall where the score rose.
    right = HetLoRA._score
    monkeypatch.setattr(HetLoRA, "_score", lambda self, *parts: -right(self, *parts))
    wrong = strategy.ranks(strategy.apply(state, moved(strategy, state, factors), 1))
    assert (wrong == after) is all(factor == 1.0 or len(set(ranks)) == 1 for factor in factors.values())


def test_the_score_is_a_sum_over_layers_of_products_of_norms() -> None:
    """One layer's rises by 1 and the other's falls by 2: neither of them decides, nor do single factors."""
    strategy = HetLoRA(setting(HALF, ranks=(1, 4)))
    state = random_start(strategy)
    a = pairs(SPECS)[1].a
    for up, pruned in ((0.1, True), (100.0, False)):
        found = moved(strategy, state, {1: 0.5})
        found.updates[0].tensors[a][2:] *= up  # type: ignore[index]
        before, after = (
            sum(float(np.linalg.norm(held[b][:, 2:4]) * np.linalg.norm(held[a][2:4])) for _, a, b in pairs(SPECS))
            for held in (state.tensors, found.updates[0].tensors)
        )
        assert (after < before) is pruned
        assert strategy.ranks(strategy.apply(state, found, 1)) == ((1, 2) if pruned else (1, 4))


def test_nothing_is_pruned_from_the_seeds_start_or_without_decay() -> None:
    """B starts at zero, and a score cannot fall below that."""
    for options, start in ((HALF, start_of), (HetLoraOptions(decay=1.0), random_start)):
        strategy = HetLoRA(setting(options, ranks=(1, 4, 2)))
        state = start(strategy)
        ended = strategy.apply(state, moved(strategy, state, {0: 0.5, 1: 0.5, 2: 0.5}), 1)
        assert strategy.at(ended) is strategy


def test_ranks_that_no_client_holds_any_more_are_zero() -> None:
    """Else the server's model would have what no client is sent."""
    strategy = HetLoRA(setting(HALF, ranks=(1, 4, 2)))
    state = random_start(strategy)
    ended = strategy.apply(state, moved(strategy, state, {1: 0.5, 2: 2.0}), 1).tensors
    for _, a, b in pairs(SPECS):
        assert not ended[a][2:].any()
        assert not ended[b][:, 2:].any()
        assert ended[a][:2].all()
        assert ended[b][:, :2].all()


# -- rounds -------------------------------------------------------------------------------------------

MOST = HetLoraOptions(decay=0.7)
RAGGED = (1, 3, 2, 1, 3)
AFTER = [RAGGED, (1, 2, 1, 1, 3), (1, 1, 1, 1, 3)]
"""The ranks of rounds 1 to 3, where the factors of clients 1 and 2 halve in each round."""


def halving(server: FlowerStrategy) -> Node:
    """A node whose clients return what they were sent, clients 1 and 2 half of it, and the others twice."""

    def node(message: Any) -> Any:
        told = read_instruction(message.content)
        if message.metadata.message_type == "evaluate":
            reports = [ClientReport(client, examples=10, metrics={"loss": 1.0}) for client in told.clients]
            return Reply(reports).to_content()
        updates = []
        for place, client in enumerate(told.clients):
            held = at_rank(server.strategy.setting.specs, told.ranks[place])
            factor = 0.5 if client in (1, 2) else 2.0
            tensors = {name: factor * cut(value, held[name].shape) for name, value in told.tensors.items()}
            updates.append(
                Update(ClientReport(client, examples=examples_of(client), steps=3, metrics={"loss": 1.0}), tensors)
            )
        return answer(told, updates)

    return node


def server_at(strategy: Strategy, state: ServerState | None = None, **changes: Any) -> FlowerStrategy:
    start = strategy.initial(seeded_of("lora"))
    start = replace(start, tensors=update_of(99, 7, strategy.sent(1)))
    return server_of(strategy, "lora", state or start, **changes)


def go(server: FlowerStrategy, rounds: int, completed: int = 0) -> tuple[Arrays, list[Any], LoopGrid]:
    grid = LoopGrid({1: halving(server), 2: halving(server)})
    result = server.start(grid, server.arrays, num_rounds=rounds, completed=completed)
    assert result.arrays is not None
    return from_named_arrays(result.arrays), [dict(m) for m in result.train_metrics_clientapp.values()], grid


@pytest.mark.parametrize("wrapped", [False, True])
def test_pruned_ranks_are_what_is_sent_received_and_counted(wrapped: bool) -> None:
    """In rounds 1 to 3, also of a strategy around it, and where clients are asked to evaluate themselves."""
    inner = strategy_of("hetlora", "lora", RAGGED, config=Config().with_options(MOST), head=Role.PERSONAL)
    strategy = FedProx(inner, 0.1) if wrapped else inner
    assert strategy.local(1) == LocalTerms(proximal=0.1 * wrapped, penalty=0.01, decay=0.7)
    server = server_at(strategy)
    _, lines, grid = go(server, 3)
    assert server.replies is not None
    assert not server.replies.refused
    per_rank = 8 * sum(layer.d_in + layer.d_out for layer in MATRIX_LAYERS)
    told = [(m.metadata.message_type, read_instruction(m.content)) for m in grid.sent]
    for number, ranks in enumerate(AFTER, 1):
        line = lines[number - 1]
        assert line["bytes_up"] == per_rank * sum(ranks)
        for kind, when in (("train", number), ("evaluate", number)):
            if kind == "evaluate" and number == 1:
                continue  # the evaluation after round r is told r + 1
            sent = [one for name, one in told if name == kind and one.round == when]
            assert tuple(rank for one in sent for rank in one.ranks) == ranks
            assert all(one.tensors["m.0.q.lora_A"].shape == (max(one.ranks), 6) for one in sent)
    assert server.strategy.setting.ranks == (1, 1, 1, 1, 3)
    assert server.payloads.up(4, 1) < server.payloads.up(4, 4)


def test_an_update_at_the_rank_before_it_was_pruned_is_refused() -> None:
    strategy = strategy_of("hetlora", "lora", RAGGED, config=Config().with_options(MOST))
    server = server_at(strategy)
    go(server, 1)
    specs = server.strategy.setting.specs

    def spoil(client: int, update: Arrays) -> Arrays:
        return update_of(client, 2, at_rank(specs, RAGGED[client])) if client == 1 else update

    one_round(server, LoopGrid({k: node_of(server, spoil) for k in range(1, 6)}), 2)
    assert server.replies is not None
    assert "has shape [3, 6], not [2, 6]" in server.replies.refused[1]
    assert list(server.replies.refused) == [1]


def test_a_resumed_run_has_its_pruned_ranks_and_one_that_forgets_them_differs() -> None:
    strategy = strategy_of("hetlora", "lora", RAGGED, config=Config().with_options(MOST))
    expected, lines, _ = go(server_at(strategy), 4)
    first = server_at(strategy)
    go(first, 2)
    state = saved(first.state)
    server = server_at(strategy, state)
    ended, rest, _ = go(server, 4, completed=2)
    assert rest == lines[2:]
    assert ended.keys() == expected.keys()
    assert all(np.array_equal(ended[name], expected[name]) for name in expected)
    assert server.strategy.setting.ranks == (1, 1, 1, 1, 3)
    _, forgot, _ = go(server_at(strategy, replace(state, extra={})), 4, completed=2)
    assert forgot != lines[2:]


def test_a_record_says_the_rank_that_a_client_trained_with() -> None:
    report = ClientReport(3, examples=5, steps=2, metrics={"loss": 0.5})
    assert client_line(2, report, None, 4) == {"round": 2, "client": 3, "rank": 4} | {
        "examples": 5, "steps": 2, "loss": 0.5, "refused": None,
    }  # fmt: skip
    assert "rank" not in client_line(2, report, None, None)


def test_an_evaluator_asks_for_the_ranks_that_clients_hold() -> None:
    strategy = strategy_of("hetlora", "lora", RAGGED)
    evaluator = TrainerEvaluator(None, 0, strategy)  # type: ignore[arg-type]
    roles = {"A": Role.SHARED}
    assert evaluator._instruction({}, roles, 1, (1, 4)).ranks == (3, 3)
    pruned = strategy_of("hetlora", "lora", AFTER[1])
    assert evaluator.at(pruned)._instruction({}, roles, 1, (1, 4)).ranks == (2, 3)


def test_the_plan_says_that_bytes_are_the_most(tmp_path: Path) -> None:
    keys = {"strategy.name": "hetlora", "method.rank": 2, "method.ranks": "1,2,2,1"}
    said = shown(plan(tmp_path, **keys))
    assert "down at most" in said
    assert "ranks by client in round 1, which fall where they are pruned: 1, 2, 2, 1" in said
    assert "HetLoRA's penalty on the last ranks, lambda 0.01" in said
    assert "at most" not in shown(plan(tmp_path, **keys | {"strategy.name": "zero-padding"}))


@pytest.mark.parametrize(
    ("key", "value"), [("penalty", -1.0), ("penalty", float("nan")), ("decay", 0.0), ("decay", 1.1)]
)
def test_options_that_mean_nothing_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"hetlora.{key}"):
        HetLoraOptions(**{key: value})
