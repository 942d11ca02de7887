"""Ravan's heads by client: means over those that have trained a head, clients on top of the server's whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from clients.start import StartTensors
from fedlora.config import Config, TrainConfig
from fedlora.data import FederatedData
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.exchange import Outcome
from fedlora.reduce import Reduced, weighted_mean
from fedlora.reduce.one_by_one import ClientUpdate
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from simulations.baselines import Federated, run_baselines
from strategies.fedprox import FedProx
from tests.support.federation import RAGGED, one_round, server_of, strategy_of
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import alone, engine_of, random_start
from tests.support.plans import plan, shown
from tests.support.trainers import tiny_worker
from tests.test_dp_step import alone_under_dp, off, private_step, ragged, row_gradients
from tests.test_fed_plora import first_losses, told
from tests.test_fixed import ROWS
from tests.test_in_process import settled
from tests.test_unpadded import tried

HEADS = 3
TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
KEYS = {"strategy.name": "ravan", "ravan.heads": 4, "method.ranks": "1,4,2,3"}


# -- the server ---------------------------------------------------------------------------------------


def slow_means(strategy: Strategy, held: Arrays, number: int, rows: Callable[[int], int]) -> Arrays:
    """Return the server's tensors after a round, head by head from the formula."""
    after, clients = {name: value.copy() for name, value in held.items()}, range(len(RAGGED))
    own = {k: update_of(k, number, strategy.expected(number, k)) for k in clients}
    for name in (name for name in held if name.endswith(".ravan_H")):
        scale = name.replace("_H", "_s")
        for i in range(HEADS):
            holders = {k: strategy.modules(number, k).index(i) for k in clients if i in strategy.modules(number, k)}
            total = sum(rows(k) for k in holders)
            if holders:
                after[name][i] = sum(rows(k) / total * own[k][scale][j] * own[k][name][j] for k, j in holders.items())
    for name in ("head.weight", "head.bias"):
        after[name] = sum(rows(k) * one[name] for k, one in own.items()) / sum(map(rows, clients))
    return after


def ended(number: int = 1, **changes: Any) -> tuple[Strategy, Arrays, Arrays]:
    """Return the strategy, what its server held before a round, and after it."""
    strategy = strategy_of("ravan", "ravan", RAGGED)
    start = ServerState(update_of(99, 7, strategy.sent(number)))
    server = server_of(strategy, "ravan", start, **changes)
    return strategy, dict(start.tensors), one_round(server, LoopGrid({1: node_of(server), 2: node_of(server)}), number)


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_each_head_is_averaged_over_those_that_have_trained_it(weights: str) -> None:
    rows = examples_of if weights == "examples" else lambda _client: 1
    for number in range(1, 6):
        strategy, before, after = ended(number, weights=weights)
        assert off(after, slow_means(strategy, before, number, rows)) < 1e-12
        assert strategy.exact is False, "shares of clients differ by head"


def test_planted_mean_over_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With zeros for heads that a client has not trained: they shrink."""
    right = np.divide
    monkeypatch.setattr(
        "strategies.some_modules.np.divide",
        lambda value, weight, **rest: right(value, np.full_like(weight, sum(map(examples_of, range(5)))), **rest),
    )
    strategy, before, after = ended()
    assert off(after, slow_means(strategy, before, 1, examples_of)) > 0.1


@pytest.mark.parametrize("ranks", [(), (HEADS,) * 5])
def test_all_heads_at_all_clients_are_the_mean_of_the_products_to_the_bit(ranks: tuple[int, ...]) -> None:
    strategy = strategy_of("ravan", "ravan", ranks)
    updates = [ClientUpdate(k, examples_of(k), update_of(k, 1, strategy.expected(1, k))) for k in range(5)]
    products = []
    for one in updates:
        own = {name: value for name, value in one.tensors.items() if not name.endswith("_s")}
        own |= {n: one.tensors[n.replace("_H", "_s")][:, None, None] * v for n, v in own.items() if n.endswith("_H")}
        products.append(replace(one, tensors=own))
    expected = weighted_mean(products, products[0].tensors)
    state = ServerState(update_of(99, 7, strategy.sent(1)))
    after = strategy.apply(state, Reduced(5, updates=tuple(updates)), 1).tensors
    assert after.keys() == expected.keys()
    assert all(np.array_equal(after[name], value) for name, value in expected.items())
    assert strategy.modules(1, 0) == FedProx(strategy, 0.1).modules(1, 0) == ()
    assert strategy.exact is True


def test_the_plan_has_each_clients_heads_up_and_all_of_them_down(tmp_path: Path) -> None:
    keys = {"strategy.name": "ravan", "ravan.heads": 2, "method.head": "frozen"}
    ups, downs = plan(tmp_path, **keys, **{"method.ranks": "1,2,2,1"}).traffic
    whole_ups, whole_downs = plan(tmp_path, **keys).traffic
    assert ups[0] * 8 == whole_ups[0] * 6
    assert downs[0] == whole_downs[0]
    lines = shown(plan(tmp_path, **keys, **{"method.ranks": "1,2,2,1"}))
    assert "ranks by client: 1, 2, 2, 1; what is said of a client above is for ravan.heads = 2" in lines
    assert "server mean of updates: not exact" in lines


# -- the client ---------------------------------------------------------------------------------------


def test_a_client_starts_from_the_whole_model(tmp_path: Path) -> None:
    """Before its first step, with any number of heads, its loss is that of the server's model; it sends its own."""
    worker = tiny_worker(tmp_path, **KEYS)
    here, there = first_losses(worker)
    assert here == pytest.approx(there, abs=1e-12)
    updates = worker.train(told(worker))
    for update, heads in zip(updates, (1, 4, 2, 3), strict=True):
        assert update.report.outcome is Outcome.OK
        assert {len(v) for n, v in update.tensors.items() if n.endswith(("_H", "_s"))} == {heads}
        assert not [name for name in update.tensors if "places" in name or "others" in name]
    for update in worker.train(told(worker, modules=((0,), (0, 1), (0, 4), (1,)))):
        assert update.report.outcome is Outcome.FAILED
        assert "the instruction names modules beyond ravan.heads = 4" in update.report.reason


def test_planted_heads_that_are_lost_at_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StartTensors.fixed

    def lost(self: StartTensors, *args: Any) -> Arrays:
        return {n: np.zeros_like(v) if n.endswith("others") else v for n, v in right(self, *args).items()}

    monkeypatch.setattr(StartTensors, "fixed", lost)
    here, there = first_losses(tiny_worker(tmp_path, **KEYS))
    away = [abs(one - other) for one, other in zip(here, there, strict=True)]
    assert away[1] < 1e-12, "the client that trains all heads has no others"
    assert min(away[0], away[2], away[3]) > 1e-6


def works_of(engine: Engine, rows: Sequence[Any]) -> tuple[list[ClientWork], Mapping[str, Any]]:
    """Three clients of one server's model, that train 1, 3 and 2 of its 3 heads, and what they have in common."""
    whole, works = random_start(engine), []
    trained = [name for name in whole if not name.endswith(("ravan_A", "ravan_B"))]
    for work, modules in zip(ragged(whole, "bert", rows), ((1,), (0, 1, 2), (0, 2)), strict=True):
        start = {name: whole[name][list(modules)] if "ravan" in name else whole[name] for name in trained}
        works.append(replace(work, start=start, fixed=engine.method.folded(whole, modules)))
    return works, {name: value for name, value in whole.items() if name not in trained}


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
def test_a_pack_equals_one_client_and_one_row_at_a_time(private: bool) -> None:
    """By the formula, head by head; in one pass a step, in many, and on tokens without padding."""
    engine = engine_of("ravan", "bert")
    works, common = works_of(engine, [[[0, 3, 1], [], [2]], *ROWS[1:]] if private else ROWS)
    fixed = [replace(work, fixed={**common, **work.fixed}) for work in works]
    grads = row_gradients("ravan", "bert", engine, dict(works[0].start), fixed[0], works[0].batches[0])
    clip = float(np.median(np.sqrt(sum((value.reshape(len(value), -1) ** 2).sum(1) for value in grads.values()))))
    for some in (engine, replace(engine, max_cost=40), tried(engine_of("ravan", "bert"))):
        step = private_step(3, noise=0.01, clip=clip) if private else None
        results = train_pack(some, works, common, TRAIN, step)
        assert [result.error for result in results] == [""] * 3
        for k, (result, work) in enumerate(zip(results, fixed, strict=True)):
            if step is None:
                expected = alone("ravan", "bert", engine, work, work.fixed, TRAIN)
            else:
                noise: Any = step.randoms[k]
                assert len(noise.drawn[0]) == sum(value.size for value in work.start.values()), (
                    "for trained heads alone"
                )
                expected = alone_under_dp("ravan", "bert", engine, work, step, noise, TRAIN)
            assert off(result.tensors, expected) < 1e-10
            assert off(expected, dict(work.start)) > 1e-3, "control: it moves"


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
def test_all_heads_by_name_are_all_heads_to_the_bit(private: bool) -> None:
    """A client that trains all heads may stand in a pack beside one that does not: it is what it is without."""
    engine, results = engine_of("ravan", "bert"), []
    (_, work, _), common = works_of(engine, ROWS)
    for fixed in (work.fixed, {}):
        step = private_step(1) if private else None
        results += train_pack(engine, [replace(work, fixed=fixed)], common, TRAIN, step)
    assert results[0].error == ""
    assert all(np.array_equal(results[0].tensors[name], value) for name, value in results[1].tensors.items())


# -- what is left out ------------------------------------------------------------


def test_a_baseline_by_itself_trains_all_heads(tmp_path: Path) -> None:
    """It has no server's model on which it could train some."""

    class Asked(Exception):
        pass

    def ask(config: Config, _data: FederatedData, _frozen: frozenset[str]) -> dict[str, Any]:
        assert config.strategy.name == "local"
        raise Asked(config.method.ranks)

    ranks = "1,2,2,1"
    for name, own in (("ravan", ""), ("fed-plora", ranks)):
        config, data = settled(tmp_path, **{"strategy.name": name, "method.ranks": ranks})
        run = Federated(config, data, tmp_path, 1, 4, None, frozenset())
        with pytest.raises(Asked, match=f"^{own}$"):
            run_baselines(run, ask, lambda *_: [], Console(quiet=True))
