"""Fed-PLoRA: who trains which modules, what they start from, their means over those that trained them; bugs planted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.start import StartTensors
from clients.worker import Worker
from fedlora.config import Config
from fedlora.exchange import Instruction, Outcome
from fedlora.methods import METHODS, Lora, Method
from fedlora.methods.factors import Factor
from fedlora.methods.products import pairs
from fedlora.plugins import methods_of
from fedlora.roles import Role
from fedlora.server.core import Core
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.wire import read_instruction
from simulations.setup import federation_of
from strategies import STRATEGIES, FedAvg, FedPLoRA
from strategies.build import build_strategy
from strategies.fedprox import FedProx
from tests.support.federation import RAGGED, one_round, run, seeded_of, server_of, strategy_of
from tests.support.formulas import LAYERS
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import engine_of, setting
from tests.support.plans import plan, shown
from tests.support.trainers import dp_worker, noted, tiny_worker
from tests.test_in_process import settled, under_flower

WHOLE = 3


def off(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


# -- who trains what ----------------------------------------------------------------------------------


def test_a_client_draws_as_many_modules_as_its_rank() -> None:
    """By seed, round and client, whatever is around the strategy, and each module as often as any other."""
    strategy = strategy_of("fed-plora", "lora", RAGGED)
    drawn = {(number, k): strategy.modules(number, k) for number in range(1, 301) for k in range(5)}
    for (number, k), modules in drawn.items():
        assert list(modules) == sorted(set(modules)), "ascending, none twice"
        assert len(modules) == RAGGED[k]
        assert set(modules) <= set(range(WHOLE))
        assert FedProx(strategy, 0.1).modules(number, k) == modules
    for k in (0, 2, 3, 4):
        counts = np.bincount([place for number in range(1, 301) for place in drawn[number, k]], minlength=WHOLE)
        expected = 300 * RAGGED[k] / WHOLE
        assert np.abs(counts - expected).max() < 6 * np.sqrt(expected), counts
    rounds = [[drawn[number, k] for number in range(1, 301)] for k in (0, 3)]  # two clients of one rank
    assert rounds[0] != rounds[1]
    other = strategy_of("fed-plora", "lora", RAGGED, config=Config(seed=1))
    assert any(other.modules(number, 0) != drawn[number, 0] for number in range(1, 301))
    assert strategy_of("fed-plora", "lora").modules(1, 0) == (), "without ranks by client all train all"


@pytest.mark.parametrize("wrapped", [False, True])
def test_all_goes_down_and_each_clients_own_modules_come_up(wrapped: bool) -> None:
    inner = strategy_of("fed-plora", "lora", RAGGED, head=Role.PERSONAL)
    server = server_of(FedProx(inner, 0.1) if wrapped else inner, "lora")
    grid = LoopGrid({1: node_of(server), 2: node_of(server)})
    run(server, grid, 2)
    seen = set()
    for message in grid.sent:
        told = read_instruction(message.content)
        assert told.ranks == ()
        assert told.tensors["m.0.q.lora_A"].shape == (WHOLE, 6)
        assert told.tensors["m.0.q.lora_B"].shape == (10, WHOLE)
        if message.metadata.message_type == "train":
            assert told.modules == tuple(inner.modules(told.round, client) for client in told.clients)
            for client in told.clients:
                assert told.part((client,)).modules == (told.modules_of(client),)
                seen.add((told.round, client))
        else:
            assert told.modules == (), "a client is measured with the whole adapter"
    assert seen == {(number, client) for number in (1, 2) for client in range(5)}
    per_rank = 8 * sum(layer.d_in + layer.d_out for layer in LAYERS)
    assert server.replies is not None
    assert server.replies.traffic.bytes_up == per_rank * sum(RAGGED)
    assert server.replies.traffic.bytes_down == 2 * per_rank * WHOLE * 5, "once more to be measured"


def test_the_plan_has_the_bytes_of_the_whole_adapter_down(tmp_path: Path) -> None:
    keys = {"strategy.name": "fed-plora", "method.rank": 2, "method.head": "frozen"}
    ups, downs = plan(tmp_path, **keys, **{"method.ranks": "1,2,2,1"}).traffic
    whole_ups, whole_downs = plan(tmp_path, **keys).traffic
    assert ups[0] * 8 == whole_ups[0] * 6
    assert downs[0] == whole_downs[0]
    assert "ranks by client: 1, 2, 2, 1" in shown(plan(tmp_path, **keys, **{"method.ranks": "1,2,2,1"}))


# -- the server's mean --------------------------------------------------------------------------------


def slow_means(strategy: Strategy, held: Arrays, number: int, rows: Callable[[int], int]) -> Arrays:
    """Return the server's tensors after a round, module by module from the formula."""
    after = {name: value.copy() for name, value in held.items()}
    own = {k: update_of(k, number, strategy.expected(number, k)) for k in range(len(strategy.setting.ranks))}
    for _, a, b in pairs(strategy.setting.specs):
        for j in range(WHOLE):
            holders = {k: strategy.modules(number, k).index(j) for k in own if j in strategy.modules(number, k)}
            total = sum(rows(k) for k in holders)
            if holders:
                after[a][j] = sum(rows(k) / total * own[k][a][at] for k, at in holders.items())
                after[b][:, j] = sum(rows(k) / total * own[k][b][:, at] for k, at in holders.items())
    for name in ("head.weight", "head.bias"):
        after[name] = sum(rows(k) * one[name] for k, one in own.items()) / sum(rows(k) for k in own)
    return after


def ended(ranks: tuple[int, ...], number: int = 1, **changes: Any) -> tuple[Strategy, Arrays, Arrays]:
    """Return a strategy, what its server held before a round, and after it."""
    strategy = strategy_of("fed-plora", "lora", ranks)
    start = ServerState(update_of(99, 7, strategy.sent(number)))
    server = server_of(strategy, "lora", start, clients=len(ranks), **changes)
    return strategy, dict(start.tensors), one_round(server, LoopGrid({1: node_of(server), 2: node_of(server)}), number)


@pytest.mark.parametrize("weights", ["examples", "equal"])
def test_each_module_is_averaged_over_those_that_have_trained_it(weights: str) -> None:
    for number in range(1, 6):
        strategy, before, after = ended(RAGGED, number, weights=weights)
        rows = examples_of if weights == "examples" else lambda _client: 1
        assert off(after, slow_means(strategy, before, number, rows)) < 1e-12


def lone_round() -> int:
    """Return a round in which two clients of rank 1 train one module, and leave two to nobody."""
    strategy = strategy_of("fed-plora", "lora", (1, 1))
    return next(number for number in range(1, 99) if strategy.modules(number, 0) == strategy.modules(number, 1))


def test_a_module_that_nobody_has_trained_stays_as_it_was() -> None:
    number = lone_round()
    strategy, before, after = ended((1, 1), number)
    (trained,) = strategy.modules(number, 0)
    others = [j for j in range(WHOLE) if j != trained]
    for _, a, b in pairs(strategy.setting.specs):
        assert np.array_equal(after[a][others], before[a][others])
        assert np.array_equal(after[b][:, others], before[b][:, others])
        assert np.abs(after[a][trained] - before[a][trained]).max() > 1e-3
    assert off(after, slow_means(strategy, before, number, examples_of)) < 1e-12


def test_planted_mean_over_all_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With zeros for modules that a client has not trained, as zero-padding would have it."""
    right = np.divide
    monkeypatch.setattr(
        "strategies.some_modules.np.divide",
        lambda value, weight, **rest: right(value, np.full_like(weight, sum(map(examples_of, range(5)))), **rest),
    )
    strategy, before, after = ended(RAGGED)
    assert off(after, slow_means(strategy, before, 1, examples_of)) > 0.1


def test_planted_modules_drawn_anew_between_training_and_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a counter, as of a generator with a state; the server then takes updates for other modules."""
    right, drawn = FedPLoRA.modules, [0]

    def anew(self: FedPLoRA, server_round: int, client: int) -> tuple[int, ...]:
        drawn[0] += 1
        return right(self, 1000 * server_round + drawn[0], client)

    strategy, before, _ = ended(RAGGED)
    expected = slow_means(strategy, before, 1, examples_of)
    monkeypatch.setattr(FedPLoRA, "modules", anew)
    assert off(ended(RAGGED)[2], expected) > 0.1


@pytest.mark.parametrize("ranks", [(), (3, 3, 3, 3, 3)])
def test_equal_ranks_are_fedavg_to_the_bit(ranks: tuple[int, ...]) -> None:
    results = []
    for strategy in (strategy_of("fed-plora", "lora", ranks), FedAvg(setting("lora"))):
        server = server_of(strategy, "lora", dtype="float32")
        results.append(run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 3))
    assert all(np.array_equal(results[0][name], value) for name, value in results[1].items())


def test_a_change_is_measured_from_the_modules_that_were_sent() -> None:
    """``federation.max-change``: clients that change nothing pass any bound; those of other modules do not."""
    strategy = strategy_of("fed-plora", "lora", RAGGED)

    def refused(spoil: Any) -> set[int]:
        server = server_of(strategy, "lora", ServerState(update_of(99, 7, strategy.sent(1))), max_change=1e-6)
        nodes = {k: node_of(server, spoil, same=seeded_of("lora")) for k in range(1, 6)}
        one_round(server, LoopGrid(nodes), 1)
        assert server.replies is not None
        return set(server.replies.refused)

    def turned(client: int, update: Arrays) -> Arrays:
        return (
            {n: np.flip(v, axis=0) if n.endswith("lora_A") else v for n, v in update.items()} if client == 1 else update
        )

    assert refused(None) == set()
    assert refused(turned) == {1}


# -- the client ---------------------------------------------------------------------------------------

RANK = 4
KEYS = {"strategy.name": "fed-plora", "method.rank": RANK, "method.ranks": "1,4,2,3", "method.alpha": 8.0}


def told(worker: Worker, number: int = 1, **changes: Any) -> Instruction:
    """What the server tells all four clients, of an adapter none of whose modules is zero."""
    model = worker.loaded.model
    strategy = build_strategy(model.config, model.specs)
    generator = np.random.default_rng(0)
    state = ServerState(
        {name: value + 0.2 * generator.standard_normal(value.shape) for name, value in model.initial.items()}
    )
    core = Core(strategy, federation_of(model.config), state)
    return replace(core.instruction(number, range(4)), **changes)


def test_a_client_starts_from_the_whole_adapter(tmp_path: Path) -> None:
    """Its own modules and the folded ones add up to what the server sent, at any rank."""
    worker = tiny_worker(tmp_path, **KEYS)
    start, instruction = worker.loaded.trainer.start, told(worker)
    common = start.common(instruction)
    for client, rank in enumerate((1, 4, 2, 3)):
        own, fixed = start.of(instruction, client, common), start.fixed(instruction, client, common)
        for layer, a, b in pairs(start.model.specs):
            assert own[a].shape[0] == own[b].shape[1] == rank
            assert fixed[f"{layer}.residual_A"].shape[0] == RANK - rank
            whole = own[b] @ own[a] + fixed[f"{layer}.residual_B"] @ fixed[f"{layer}.residual_A"]
            assert np.abs(whole - common[b] @ common[a]).max() < 1e-12


def test_only_methods_with_modules_are_trained_in_part() -> None:
    """What a client lacks of the others would be missing from its model, without a word."""
    for name in (name for name in STRATEGIES if STRATEGIES[name].folds):
        for kind in methods_of(name):
            assert METHODS[kind].folded is not Method.folded, f"{name} on {kind}"
    with pytest.raises(TypeError, match="S2Lora has no modules"):
        engine_of("s2-lora", "bert").method.folded({}, [0])


def first_losses(worker: Worker) -> tuple[list[float], list[float]]:
    """Return each client's loss in its only step, on all its rows, and that of the server's model on them."""
    trainer, instruction = worker.loaded.trainer, told(worker)
    rows = [trainer.data.training_rows(client) for client in range(4)]
    results = trainer.run(instruction, [[own] for own in rows])
    facts = [worker.evaluate(instruction.tensors, "train", own.tolist())["loss"] for own in rows]
    return [result.loss for result in results], [float(loss.mean()) for loss in facts]


def test_there_is_no_noise_of_initialisation(tmp_path: Path) -> None:
    """Before its first step a client of any rank computes what the server's model does."""
    here, there = first_losses(tiny_worker(tmp_path, **KEYS))
    assert here == pytest.approx(there, abs=1e-12)


def test_planted_fold_that_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StartTensors, "fixed", lambda *_: {})
    here, there = first_losses(tiny_worker(tmp_path, **KEYS))
    away = [abs(one - other) for one, other in zip(here, there, strict=True)]
    assert away[1] < 1e-12, "the client that trains all modules has none to fold"
    assert min(away[0], away[2], away[3]) > 1e-6


def test_planted_scale_by_a_clients_own_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alpha / r_k in place of alpha / R; residuals keep theirs."""
    right = Lora.factors

    def own_scale(self: Lora, tensors: Any) -> dict[str, Factor]:
        found = right(self, tensors)
        for name, factor in found.items():
            real = (factor.A != 0).any(-1).sum(-1)  # type: ignore[union-attr]  # [*]
            found[name] = factor._replace(B=factor.B * (self.rank / real[..., None, None]))  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(Lora, "factors", own_scale)
    here, there = first_losses(tiny_worker(tmp_path, **KEYS))
    away = [abs(one - other) for one, other in zip(here, there, strict=True)]
    assert away[1] < 1e-12
    assert min(away[0], away[2], away[3]) > 1e-6


def test_what_is_folded_is_not_trained_and_not_sent(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **KEYS)
    instruction = told(worker)
    updates = worker.train(instruction)
    for client, update in enumerate(updates):
        assert update.report.outcome is Outcome.OK
        assert update.tensors.keys() == worker.loaded.model.specs.keys()
        assert {v.shape[0] for n, v in update.tensors.items() if n.endswith("lora_A")} == {(1, 4, 2, 3)[client]}
    # Alone, in a pack of one, it is the same client.
    for client in range(4):
        (alone,) = worker.train(instruction.part((client,)))
        assert off(alone.tensors, updates[client].tensors) < 1e-10


def test_a_client_is_measured_with_the_whole_adapter(tmp_path: Path) -> None:
    """Where it keeps its head: at its own rank it would lack what it has folded."""
    worker = tiny_worker(tmp_path, **KEYS, **{"method.head": "personal"})
    whole = replace(told(worker), modules=(), ranks=())
    facts = {name: value for name, value in whole.tensors.items() if "lora" in name}
    rows = range(len(worker.loaded.model.examples["test"]))
    loss = worker.evaluate(facts, "test", list(rows))["loss"].sum()
    for report in worker.evaluate_personal(replace(whole, tensors=facts), "test"):
        assert report.metrics["loss"] == pytest.approx(loss, rel=1e-12)
    strategy = build_strategy(worker.loaded.model.config, worker.loaded.model.specs)
    assert strategy.held == FedProx(strategy, 0.1).held == ()
    assert strategy_of("zero-padding", "lora", RAGGED).held == RAGGED


def test_modules_beyond_the_rank_are_refused(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **KEYS)
    for update in worker.train(told(worker, modules=((0,), (0, 1), (0, 4), (1,)))):
        assert update.report.outcome is Outcome.FAILED
        assert "the instruction names modules beyond method.rank = 4" in update.report.reason


def test_noise_under_dp_is_for_what_is_trained(tmp_path: Path) -> None:
    """A client's update at rank r_k is finite, of its shapes, paid for; its note has nothing of an error."""
    worker = dp_worker(tmp_path, **KEYS)
    for client, update in enumerate(worker.train(replace(told(worker), ledger_heads=("",) * 4))):
        assert update.report.outcome is Outcome.OK
        assert update.report.ledger_head
        assert {v.shape[1] for n, v in update.tensors.items() if n.endswith("lora_B")} == {(1, 4, 2, 3)[client]}
        assert json.loads(noted(tmp_path, client).splitlines()[-1])["error"] == ""


@pytest.mark.parametrize("ranks", ["", "2,2,2,2"])
def test_a_run_at_equal_ranks_is_fedavgs_to_the_bit(tmp_path: Path, ranks: str) -> None:
    """Two rounds of real training."""
    states = []
    for name, own in (("fed-plora", {"method.ranks": ranks}), ("fedavg", {})):
        config, data = settled(tmp_path / name, **{"strategy.name": name, **own})
        states.append(under_flower(config, data, tmp_path / name).state.tensors)
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], value) for name, value in states[1].items())


def test_the_adapter_is_an_ordinary_lora_of_the_whole_rank(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **KEYS)
    files = worker.export(told(worker).tensors)  # tried out in PEFT
    assert json.loads(files["adapter_config.json"])["r"] == RANK
