"""What a run prints and records before it starts."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clients.shards import Shard
from clients.site import Speed
from fedlora.engine import plan_batches
from fedlora.plugins import methods_of
from fedlora.reports.format import human_bytes
from fedlora.seeded import Seeded
from simulations.cli import run
from simulations.plan import trained_in_a_round
from strategies import STRATEGIES
from tests.support.plans import plan, shown
from tests.support.trainers import tiny_flat, tiny_worker

ROOT = Path(__file__).parents[1]


def test_clients_with_one_class_are_named(tmp_path: Path) -> None:
    lone = shown(plan(tmp_path, **{"data.partition": "shards", "data.shards-per-client": 1}))
    assert "clients hold rows of one class only (" in lone
    assert "learn to answer it always" in lone
    assert "one class only" not in shown(plan(tmp_path, **{"data.partition": "iid"}))


def test_a_declared_size_that_is_far_from_the_real_one_is_named(tmp_path: Path) -> None:
    keys = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-4, "data.partition": "iid"}
    for size, named in ((500, True), (24, False), (8, True)):
        note = f"on average; sample rate, steps, denominators and delta go by privacy.client-size = {size}"
        assert (note in shown(plan(tmp_path, **keys, **{"privacy.client-size": size}))) is named


@pytest.mark.parametrize("train", [{"train.local-steps": 7}, {"train.local-steps": 0, "train.local-epochs": 2}])
def test_examples_are_those_that_training_sees(tmp_path: Path, train: dict[str, Any]) -> None:
    """The plan's count against the batches themselves, over three rounds of a sampled federation."""
    one = plan(tmp_path, **{"federation.clients-per-round": 3, "data.alpha": 0.3, **train})
    seen = 0
    for number in range(1, 4):
        for client in one.federation.cohort(number):
            rows = one.data.training_rows(client)
            batches = plan_batches(Seeded(0), number, client, rows, one.config.train)
            assert len(batches) == one.steps()[client]
            seen += sum(map(len, batches))
    assert one.examples(3) == seen


def test_predicted_work_is_the_tokens_that_training_sees(tmp_path: Path) -> None:
    """Exactly, where each row is seen as often as any other; and all that a run prints of shards goes by it."""
    changes = {"data.alpha": 0.3, "train.local-steps": 0, "train.local-epochs": 2}
    worker = tiny_worker(tmp_path, **changes)
    one = replace(
        plan(tmp_path, **changes),
        row_tokens=tuple(worker.row_tokens()),
        trainers=2,
        shards=(Shard(4, 0.5, "n", "node7"), Shard(2, 0.0)),
    )
    cost = worker.loaded.model.examples["train"].cost
    for client, predicted in one.work.items():
        batches = plan_batches(Seeded(0), 1, client, one.data.training_rows(client), one.config.train)
        assert predicted == pytest.approx(sum(int(cost[batch].sum()) for batch in batches))
    assert len(set(one.work.values())) == 4, "clients differ"
    first, second = one.record(Speed(1e-3, 1e-4, 10.0, 1000, 2**30))["shards"]
    assert first["work"] + second["work"] == pytest.approx(1)
    assert first["seconds"] == pytest.approx(1e-3 * sum(one.work[client] for client in first["clients"]))
    assert first["memory_bytes"] == 2**30
    clients = ", ".join(map(str, first["clients"]))
    said = f"trainer 0 on node7, 0.5 of a GPU and 4 thread(s): client(s) {clients} in 1 pack(s), {first['work']:.0%} of"
    assert said in shown(one)
    assert "trainer 1 on this machine, 2 thread(s): client(s) " in shown(one)


def test_what_is_measured(tmp_path: Path) -> None:
    assert plan(tmp_path).measure == "test_accuracy"
    assert plan(tmp_path, **{"data.dev-share": 0.2}).measure == "dev_accuracy"
    for changes in ({"method.head": "personal"}, {"strategy.name": "fedsa-lora"}, {"strategy.name": "local"}):
        one = plan(tmp_path, **changes)
        assert one.measure == "personal_accuracy"
        assert one.config.data.holdout == 0.2, "what clients are measured on"


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategies_say_whether_they_are_personal(name: str, tmp_path: Path) -> None:
    """The declaration, on which hold-outs depend, against the roles themselves."""
    strategy = plan(tmp_path, **{"strategy.name": name}).strategy
    assert strategy.has_personal == strategy.personal


def test_the_run_under_other_strategies_and_methods(tmp_path: Path) -> None:
    """Every pair once, with the bytes of its own plan; what the settings refuse is named."""
    flat = tiny_flat(tmp_path, **{"rounds": 3, "method.rank": 3, "mos.budget": 1, "block-lora.blocks": 2})
    console = Console(file=io.StringIO(), width=200)
    options = [word for key, value in flat.items() for word in ("-c", f"{key}={value!r}")]
    assert run(["plan", str(ROOT), "--compare", *options], console) == 0
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in written.splitlines() if line.startswith("│")]
    found = {(cells[0], cells[1]): cells for cells in lines if len(cells) == 7}
    refused = {line.split(": ")[1] for line in written.splitlines() if line.startswith("not with these settings: ")}
    assert refused == {f"{name} on mos" for name in STRATEGIES if "mos" in methods_of(name)}, "an impossible rank"
    pairs = {(name, method) for name in STRATEGIES for method in methods_of(name)}
    assert found.keys() == {pair for pair in pairs if pair[1] != "mos"}
    for name, method in (("fedavg", "lora"), ("ffa-lora", "vera"), ("flora", "lora"), ("s2-cyclic", "s2-lora")):
        one = plan(tmp_path, **{**flat, "strategy.name": name, "method.name": method})
        ups, downs = one.traffic
        assert found[name, method][3:] == [
            *(f"{trained_in_a_round(one.strategy):,}", human_bytes(sum(ups) / 12)),
            *(human_bytes(sum(ups)), human_bytes(sum(downs))),
        ]
    assert found["ffa-lora", "lora"][2] == "exact"
    assert found["fedavg", "lora"][2] == "inexact"
