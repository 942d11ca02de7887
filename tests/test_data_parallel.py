"""A trainer's threads side by side: the same numbers as packs trained and rows evaluated one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients import data_parallel
from clients.worker import Worker
from fedlora.engine import ClientResult, ClientWork, Engine, evaluate
from fedlora.exchange import Update
from simulations.setup import resolve
from tests.support.trainers import ask, dp_config, instruction, tiny_flat, tiny_job

Ask = Callable[[Worker, Sequence[int]], list[Update]]


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel, "_LEAST_PARAMETERS", 1)


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The clients of the packs that are trained, as they come."""
    seen: list[tuple[int, ...]] = []
    train = data_parallel.train_pack

    def seeing(engine: Engine, works: Sequence[ClientWork], *args: Any, **others: Any) -> list[ClientResult]:
        assert len(works) == 1 or torch.get_num_threads() == 1, "of two, of which each trains"
        seen.append(tuple(work.client for work in works))
        return train(engine, works, *args, **others)

    monkeypatch.setattr(data_parallel, "train_pack", seeing)
    return seen


def plain(worker: Worker, clients: Sequence[int]) -> list[Update]:
    return worker.train(instruction(worker, tuple(clients)))


@pytest.mark.parametrize(("private", "train"), [(False, plain), (True, ask)])
def test_threads_train_what_their_packs_give_alone(
    tmp_path: Path, packs: list[tuple[int, ...]], private: bool, train: Ask
) -> None:
    """To the bit, under DP with the noise of each client's own source."""

    def worker(name: str, threads: int) -> Worker:
        (tmp_path / name).mkdir()
        keys = {"train.local-steps": 0, "federation.num-clients": 4}
        config = (
            dp_config(tmp_path / name, **{"privacy.seed": 5})
            if private
            else resolve(tiny_flat(tmp_path / name, **keys))
        )
        job = tiny_job(config, tmp_path / name)
        return Worker(lambda: job, threads)

    try:
        found = train(worker("both", 2), (0, 1, 2, 3))
        (shares, tried) = packs[-2:], packs[:-2]
        assert sorted(client for share in shares for client in share) == [0, 1, 2, 3]
        assert all(0 < len(share) < 4 for share in shares)
        assert tried == [(0,)] * private, "made-up rows before the first round, and nothing more"
        torch.set_num_threads(1)
        alone = worker("alone", 1)
        expected = {update.client: update for share in shares for update in train(alone, share)}
    finally:
        torch.set_num_threads(1)
    assert [update.client for update in found] == [0, 1, 2, 3]
    for update in found:
        assert update.report.metrics == expected[update.client].report.metrics
        assert update.tensors.keys() == expected[update.client].tensors.keys() != set()
        for name, value in update.tensors.items():
            assert np.array_equal(value, expected[update.client].tensors[name]), name
    assert len({update.tensors[name].tobytes() for update in found}) == 4, "clients that differ"


def test_threads_evaluate_what_one_does(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    try:
        worker = Worker(lambda: job, 2)
        model = worker.loaded.model
        rows, numbers = model.examples["test"], [5, 0, 3, 2, 7, 6]
        own = [{name: value + at for name, value in model.initial.items()} for at in (0.0, 0.5)]
        group = np.array([1, 0, 0, 1, 1, 0])
        found = model.parallel.evaluate({}, rows, numbers, own=own, group=group)
        expected = evaluate(model.engine, {}, rows, numbers, own=own, group=group)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert found.keys() == expected.keys() != set()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-10)
    assert len(set(expected["loss"].tolist())) > 1
    assert worker.evaluate(model.initial, "test", [4])["loss"].shape == (1,), "one row, for two threads"


def test_weights_are_held_once(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    try:
        engines = Worker(lambda: job, 3).loaded.model.parallel._engines
    finally:
        torch.set_num_threads(1)
    assert len(engines) == 3
    assert len({id(engine.grouped.model) for engine in engines}) == 3
    weights = [[tensor.data_ptr() for tensor in engine.base.model.parameters()] for engine in engines]
    assert weights[0] == weights[1] == weights[2] != []
    slots = [{id(slot) for slot in engine.grouped._slots.values()} for engine in engines]
    assert not slots[0] & slots[1], "factors are placed in modules, which threads must not share"


def test_threads_work_together_where_the_work_is_one_clients(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    try:
        parallel = Worker(lambda: job, 2).loaded.model.parallel
    finally:
        torch.set_num_threads(1)

    def shares(*costs: int) -> list[list[int]]:
        return [share.tolist() for share in parallel._shares(costs)]

    assert shares(30, 10, 25, 5) == [[0, 3], [1, 2]]
    assert shares(10, 8) == [[0], [1]]
    assert shares(10, 1) == [[0, 1]], "one thread would take 10, both together 11 / 1.47"
    assert shares(7) == [[0]]
    assert shares() == [[]]
    assert shares(0, 0) == [[0], [1]], "clients without rows are trained, too"
