"""A base model spread over two GPUs gives what it gives on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.worker import Worker
from fedlora.engine import ClientResult, Engine, evaluate, train_pack
from fedlora.engine.blocks import checkpoint_blocks
from fedlora.engine.fast import settle
from fedlora.methods import initial_tensors
from fedlora.seeded import Seeded
from simulations.setup import resolve
from tests.support.cards import spread_engine
from tests.support.families import random_examples
from tests.support.matrix import CONFIGS, random_start
from tests.support.tiny import save_tiny_model
from tests.support.trainers import instruction, tiny_flat, tiny_job
from tests.test_dp_step import TRAIN, off, private_step, ragged
from tests.test_packing import ADAMW, make_works

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no two CUDA devices")

FAMILIES = pytest.mark.parametrize("family", ["bert", "llama-lm", "gpt2"])
METHODS = pytest.mark.parametrize("method", CONFIGS)


def same(one: list[ClientResult], two: list[ClientResult]) -> bool:
    """Whether clients trained the same on one GPU and on two."""
    assert [result.error for result in two] == [""] * len(two)
    assert [result.steps for result in two] == [result.steps for result in one]
    np.testing.assert_allclose([result.loss for result in two], [result.loss for result in one], rtol=0, atol=1e-10)
    return all(off(a.tensors, b.tensors) < 1e-10 for a, b in zip(one, two, strict=True))


@METHODS
@FAMILIES
@pytest.mark.parametrize("clients", [1, 6])
def test_training(method: str, family: str, clients: int) -> None:
    results = []
    for cards in (1, 2):
        engine = spread_engine(family, method, cards=cards)
        assert [str(card) for card in engine.cards] == [f"cuda:{card}" for card in range(cards)]
        works = [
            replace(work, start=random_start(engine)) for work in make_works(engine, clients, ADAMW, family=family)
        ]
        results.append(train_pack(engine, works, {}, ADAMW))
    assert same(*results)
    assert off(results[1][0].tensors, random_start(engine)) > 1e-3, "control: it moves"


@METHODS
@FAMILIES
def test_training_under_dp(method: str, family: str) -> None:
    results = []
    for cards in (1, 2):
        engine = spread_engine(family, method, cards=cards)
        results.append(train_pack(engine, ragged(random_start(engine), family), {}, TRAIN, private_step(3)))
    assert same(*results)


@FAMILIES
def test_blocks_computed_twice(family: str) -> None:
    """What is done where memory is short; and accelerate's hooks are there in the next round, too."""
    results = []
    for cards in (1, 2):
        engine = spread_engine(family, "lora", cards=cards)
        if cards == 2:
            assert checkpoint_blocks(engine)
        works = [replace(work, start=random_start(engine)) for work in make_works(engine, 3, ADAMW, family=family)]
        train_pack(engine, works, {}, ADAMW)
        results.append(train_pack(engine, works, {}, ADAMW))
    assert same(*results)


@METHODS
@FAMILIES
def test_evaluation(method: str, family: str) -> None:
    found = []
    for cards in (1, 2):
        engine = spread_engine(family, method, cards=cards)
        start = random_start(engine)
        own = [{name: value * scale for name, value in start.items()} for scale in (1.0, 0.5)]
        rows = random_examples(9, seed=3, family=family)
        found.append(evaluate(engine, {}, rows, range(9), own=own, group=np.arange(9) % 2))
    assert found[0].keys() == found[1].keys()
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=0, atol=1e-10)


def settled(dtype: torch.dtype) -> Engine:
    engine = spread_engine("llama-lm", "lora", cards=2, dtype=dtype)
    return settle(engine, initial_tensors(engine.method.specs(), Seeded(0), "float32"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_fit_and_the_plain_way_computes(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        engine = settled(dtype)
    assert not engine.kernels
    assert not engine.grouped.blocks
    assert engine.max_cost >= 1
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "the base model lies on 2 GPUs: the plain way computes" in said
    assert "a pass takes" in said


def test_a_trainer_of_two_gpus_loads_trains_evaluates_and_exports(tmp_path: Path) -> None:
    """transformers spreads the model when it is loaded; base, updates and exported files are those of one GPU."""
    model = save_tiny_model(tmp_path / "deep", layers=8)
    job = tiny_job(resolve(tiny_flat(tmp_path, **{"model.name": model})), tmp_path)
    one, two = (Worker(lambda: job, 1, cards=cards) for cards in (1, 2))
    assert [len(worker.loaded.model.engine.cards) for worker in (one, two)] == [1, 2]
    assert one.describe().digest == two.describe().digest
    assert two.describe().device == "cuda:0, cuda:1"
    told = instruction(one)
    trained: list[Any] = [worker.train(told) for worker in (one, two)]
    for first, second in zip(*trained, strict=True):
        assert second.report.reason == ""
        assert off(first.tensors, second.tensors) < 1e-10
    facts = [worker.evaluate(trained[0][0].tensors, "test", range(20)) for worker in (one, two)]
    np.testing.assert_allclose(facts[0]["loss"], facts[1]["loss"], rtol=0, atol=1e-10)
    files = [worker.export(trained[0][0].tensors) for worker in (one, two)]
    assert files[0] == files[1]
