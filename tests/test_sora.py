"""SoRA: gates that close and open, clients of different ranks, its export and what is reported; bugs planted.

The rest is in the matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.worker import Worker
from fedlora.config import ConfigError, TrainConfig
from fedlora.engine import train_pack
from fedlora.exchange import Instruction
from fedlora.methods import LowRank, Sora, SoraOptions, count_parameters, initial_tensors
from fedlora.methods.base import Layer
from fedlora.methods.factors import Factor
from fedlora.runs.export import adapter_files
from fedlora.runs.ranks import FILE
from fedlora.seeded import Seeded
from fedlora.server import Core
from fedlora.state import ServerState
from simulations.setup import federation_of, resolve
from strategies.build import build_strategy
from tests.support.federation import RAGGED, run, server_of, strategy_of
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import CONFIGS, engine_of, random_start, works
from tests.support.trainers import dp_worker, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential


def test_numbers_of_a_layer_and_where_they_start() -> None:
    """r gates beside LoRA's numbers, of variance 1 as N(0, 1) has; no layer's are another's."""
    layers = [Layer(f"{n}.q", 64, 48, True, False) for n in range(40)]
    specs = Sora(layers, rank=8, alpha=16.0, sparsity=0.4).specs()
    assert count_parameters(specs) == 40 * 8 * (64 + 48 + 1)
    start = initial_tensors(specs, Seeded(0))
    gates = np.concatenate([value for name, value in start.items() if name.endswith("_g")])
    assert len(set(gates.tolist())) == 320
    assert abs(gates.var() - 1) < 0.2
    assert abs(gates.mean()) < 0.2


# -- gates --------------------------------------------------------------------------------------------


def test_more_sparsity_closes_more_gates_and_too_much_is_an_error() -> None:
    engine = engine_of("sora", "bert")
    start = random_start(engine)
    closed = []
    for sparsity in (0.0, 4.0, 16.0, 1000.0):
        method = Sora(engine.base.structure.adapted, rank=3, alpha=6.0, sparsity=sparsity)
        planted = replace(engine, method=type(engine.method)(method, engine.base.structure.head))  # type: ignore[call-arg]
        result = train_pack(planted, works(start, "bert"), {}, TrainConfig(learning_rate=0.02))[0]
        closed.append(sum(int(np.sum(value == 0)) for name, value in result.tensors.items() if name.endswith("_g")))
    assert closed[0] == 0
    assert closed[1] <= closed[2] < closed[3] == sum(len(v) for n, v in start.items() if n.endswith("_g"))
    assert closed[2] > 0
    assert "the proximal step set all of" in result.error
    assert "(sora.sparsity)" in result.error


def test_a_closed_gate_opens_again_where_the_gradient_is_larger() -> None:
    """At zero it keeps its own gradient, and hides those of its row of A and its column of B."""
    method = Sora([Layer("l", 3, 2, True, False)], rank=2, alpha=2.0, sparsity=0.1)
    draws = np.random.default_rng(0)
    tensors = {name: torch.tensor(draws.standard_normal(spec.shape)) for name, spec in method.specs().items()}
    tensors["l.sora_g"] = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for value in tensors.values():
        value.requires_grad_()
    one = method.factors(tensors)["l"]
    assert isinstance(one, LowRank)
    (one.scaled_b() @ one.A).square().sum().add((one.scaled_b() @ one.A).sum()).backward()  # type: ignore[no-untyped-call]
    a, b, g = (tensors[f"l.sora_{kind}"].grad for kind in "ABg")
    assert a is not None
    assert b is not None
    assert g is not None
    assert g[0] != 0
    assert not a[0].any()
    assert not b[:, 0].any()
    assert a[1].any()


# -- clients of different ranks -----------------------------------------------------------------------

KEYS = {"strategy.name": "zero-padding", "method.name": "sora", "method.rank": 3, "method.ranks": "1,3,2,3"}
RANKS = (1, 3, 2, 3)


def told(worker: Worker, **changes: Any) -> Instruction:
    """What the server tells all four clients, of an adapter without a zero."""
    model, draws = worker.loaded.model, np.random.default_rng(0)
    held = {name: value + 0.2 * draws.standard_normal(value.shape) for name, value in model.initial.items()}
    core = Core(build_strategy(model.config, model.specs), federation_of(model.config), ServerState(held))
    return replace(core.instruction(1, range(4)), **changes)


def test_a_client_of_a_smaller_rank_trains_the_first_ranks_of_all_three(tmp_path: Path) -> None:
    """As one that is alone does, and as a SoRA of that rank and scale."""
    worker = tiny_worker(tmp_path, **KEYS, **{"method.alpha": 6.0})
    instruction = told(worker)
    updates = worker.train(instruction)
    for client, rank in enumerate(RANKS):
        own = {"strategy.name": "fedavg", "method.ranks": "", "method.rank": rank, "method.alpha": 2.0 * rank}
        part = instruction.part((client,))
        cut = {n: v[:rank] if n.endswith(("_A", "_g")) else v[:, :rank] for n, v in part.tensors.items() if "sora" in n}
        plain = tiny_worker(tmp_path, **{**KEYS, **own})
        asked = replace(part, ranks=(), tensors={**part.tensors, **cut})
        for (alone,) in (worker.train(part), plain.train(asked)):
            assert alone.tensors.keys() == updates[client].tensors.keys()
            for name, value in alone.tensors.items():
                assert np.abs(value - updates[client].tensors[name]).max() < 1e-10
        assert {len(v) for n, v in updates[client].tensors.items() if n.endswith("_g")} == {rank}


def test_noise_under_dp_is_for_the_ranks_that_a_client_holds(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path, **KEYS)
    for client, update in enumerate(worker.train(told(worker, ledger_heads=("",) * 4))):
        assert update.report.reason == ""
        gates = [value for name, value in update.tensors.items() if name.endswith("_g")]
        assert {len(value) for value in gates} == {RANKS[client]}
        assert all(np.isfinite(value).all() for value in gates)


def test_the_server_pads_gates_with_zeros_and_takes_the_step_once_more() -> None:
    strategy = strategy_of("zero-padding", "sora", RAGGED)
    server = server_of(strategy, "sora", learning_rate=2.0)
    ended = run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 1)
    total = sum(map(examples_of, range(5)))
    for name, spec in strategy.expected(1).items():
        if spec.kind == "g":
            mean = np.zeros(3)
            for k in range(5):
                own = update_of(k, 1, strategy.expected(1, k))[name]
                mean[: len(own)] += examples_of(k) / total * own
            assert np.abs(ended[name] - np.sign(mean) * np.maximum(np.abs(mean) - 2.0 * 0.05, 0)).max() < 1e-13


def test_gates_that_no_client_of_a_round_holds_stay_as_they_are() -> None:
    strategy = strategy_of("zero-padding", "sora", (1, 2, 1, 2, 1))
    server = server_of(strategy, "sora", learning_rate=2.0)
    before = dict(server.core.state.tensors)
    ended = run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 1)
    gates = [name for name, spec in strategy.expected(1).items() if spec.kind == "g"]
    for name in gates:
        assert ended[name][2] == before[name][2] != 0
        assert (ended[name][:2] != before[name][:2]).all()
    assert gates


# -- export and reports -------------------------------------------------------------------------------


def test_closed_gates_are_left_out_of_the_adapter_and_reported() -> None:
    engine = engine_of("sora", "bert")
    tensors = random_start(engine)
    first, second = (layer.name for layer in engine.base.structure.adapted[:2])
    tensors[f"{first}.sora_g"][1] = 0.0
    tensors[f"{second}.sora_g"][:] = 0.0
    files = adapter_files(engine, tensors, CONFIGS["sora"])
    found = json.loads(files[FILE])
    assert [bool(strength) for strength in found[first]] == [True, False, True]
    assert not any(found[second])
    about = json.loads(files["adapter_config.json"])
    assert about["r"] == about["lora_alpha"] == 3
    assert list(about["rank_pattern"].values()) == [2]
    assert second not in about["target_modules"]


def test_the_share_of_closed_gates_is_in_the_rounds_line() -> None:
    from fedlora.server.observers.records import sparsity

    strategy = strategy_of("fedavg", "sora")
    tensors: Arrays = update_of(0, 1, strategy.expected(1))
    gates = [name for name in tensors if name.endswith("_g")]
    tensors[gates[0]][:2] = 0.0
    assert sparsity(strategy, tensors) == pytest.approx(2 / (3 * len(gates)))


# -- planted bugs, settings ---------------------------------------------------------------------------


def ungated(right: Any) -> Any:
    """The gates forgotten."""
    return lambda self, tensors: {name: one._replace(scale=self.scale) for name, one in right(self, tensors).items()}


def gates_of_another(right: Any) -> Any:
    """Each layer's gates in the reverse order of ranks."""

    def factors(self: Sora, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        return right(self, {n: v.flip(-1) if n.endswith("_g") else v for n, v in tensors.items()})  # type: ignore[no-any-return]

    return factors


@pytest.mark.parametrize("bug", [ungated, gates_of_another])
def test_planted_gates(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sora, "factors", bug(Sora.factors))
    with pytest.raises(AssertionError):
        packed_equals_sequential("sora", frozenset({"A", "B", "g", "head"}), "gpt2")


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"sora.sparsity": -1.0}, r"sora.sparsity = -1.0: must be at least 0"),
        ({"method.rslora": True}, r"method.rslora = true: is read by lora; sora scales by alpha / rank"),
        ({"strategy.name": "hetlora", "method.ranks": "uniform:2-4"}, r"strategy 'hetlora' works with lora"),
        ({"strategy.name": "ffa-lora"}, r"strategy 'ffa-lora' works with"),
        ({"local.term": "scaffold", "train.optimizer": "sgd"}, r"takes proximal steps on what it averages"),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "sora", **flat})


def test_without_sparsity_there_is_no_penalty() -> None:
    config = resolve({"strategy.name": "fedavg", "method.name": "sora"})
    assert config.options(SoraOptions).sparsity > 0
    assert Sora.without_penalties(config).options(SoraOptions).sparsity == 0
