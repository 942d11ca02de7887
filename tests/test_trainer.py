"""The trainer and the clients' personal tensors, in this process, without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients import resident
from clients.limits import SiteLimits
from clients.personal import PersonalStore
from clients.site import Job
from clients.worker import Worker
from fedlora.data import load_corpus, load_federated
from fedlora.engine import Batching, Engine, train_pack
from fedlora.exchange import Instruction, Outcome
from fedlora.plugins import read_config
from fedlora.reduce import Reduced
from fedlora.roles import Role
from simulations.setup import resolve
from strategies.build import build_strategy
from tests.support import trainers
from tests.support.tiny import save_tiny_model
from tests.support.trainers import dp_config, tiny_flat, tiny_worker

ROLES = {"A": Role.FROZEN, "B": Role.SHARED, "head": Role.PERSONAL}


def instruction(worker: Worker, clients: tuple[int, ...], round_number: int = 1) -> Instruction:
    tensors = {name: value for name, value in worker.loaded.model.initial.items() if name.endswith("lora_B")}
    return Instruction(round_number, clients, ROLES, tensors)


def test_the_base_is_loaded_once(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path)
    assert worker.describe().base_loads == 1
    worker.train(instruction(worker, (0, 1)))
    worker.evaluate(worker.loaded.model.initial, "test", [0, 1, 2])
    assert worker.describe().base_loads == 1


def test_rows_are_tried_again_for_another_model_method_or_task_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sweep the check that rows stand apart costs half a second a cell."""
    tried, flat = [], tiny_flat(tmp_path)

    def counted(engine: Engine, tensors: Any) -> Batching:
        tried.append(engine)
        return Batching(one_group=len(tried) > 1)

    monkeypatch.setattr(resident, "find_batching", counted)
    trainer = resident.Resident(1)

    def load(**changes: Any) -> tuple[int, Batching]:
        config = resolve({**flat, **changes})
        engine = trainer.load(config, load_corpus(config)).engine
        return len(tried), engine.batching

    assert load() == (1, Batching())
    for same in ({"train.learning-rate": 0.5}, {"seed": 7}, {"strategy.name": "fedavg"}, {"federation.num-clients": 2}):
        assert load(**same) == (1, Batching())
    others = (
        {"method.rank": 3},
        {"method.alpha": 2.0},
        {"strategy.name": "mos"},
        {"strategy.name": "mos", "mos.dissociation": False},
        {"train.max-length": 9},
        {"task": "multi-label", "data.partition": "iid"},
        {"method.target-modules": "query"},
        {"model.name": save_tiny_model(tmp_path / "other", 1)},
    )
    for number, other in enumerate(others, 2):
        assert load(**other) == (number, Batching(one_group=True)), other
    assert load() == (10, Batching(one_group=True)), "of the base model that was loaded anew"


def test_only_shared_tensors_leave(tmp_path: Path) -> None:
    """Neither the frozen A nor the personal head is in a client's result."""
    worker = tiny_worker(tmp_path, **{"method.head": "personal"})
    results = worker.train(instruction(worker, (0, 2)))
    assert [result.client for result in results] == [0, 2]
    assert all(result.report.outcome is Outcome.OK for result in results)
    assert all(name.endswith("lora_B") for result in results for name in result.tensors)


def test_personal_heads_stay_and_go_on(tmp_path: Path) -> None:
    """A client goes on with its own head; another's, and what a repeated round leaves, are not mixed in."""
    worker = tiny_worker(tmp_path, **{"method.head": "personal"})
    store = worker.loaded.store
    worker.train(instruction(worker, (0, 1)))
    heads = [store.load(client, 2) for client in (0, 1)]
    assert heads[0] is not None
    assert heads[1] is not None
    assert set(heads[0]) == {"classifier.weight", "classifier.bias"}
    assert not np.array_equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])
    assert store.load(3, 2) is None
    worker.train(instruction(worker, (0, 1), 2))
    later = store.load(0, 3)
    assert later is not None
    assert not np.array_equal(later["classifier.weight"], heads[0]["classifier.weight"])
    repeated = tiny_worker(tmp_path, **{"method.head": "personal"})
    repeated.train(instruction(repeated, (0, 1), 2))
    again = store.load(0, 3)
    assert again is not None
    assert np.array_equal(again["classifier.weight"], later["classifier.weight"])


def test_personal_evaluation_uses_the_clients_own_head(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"method.head": "personal", "train.learning-rate": 0.3})
    before = worker.evaluate_personal(instruction(worker, (0, 1, 2, 3)))
    worker.train(instruction(worker, (0, 1)))
    after = worker.evaluate_personal(instruction(worker, (0, 1, 2, 3), 2))
    assert [report.examples for report in before] == [len(held) for held in worker.loaded.job.data.holdout]
    assert before[0].metrics["loss"] != after[0].metrics["loss"]
    assert before[2:] == after[2:]


def test_repeating_a_pack_gives_the_same_bits(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path)
    roles = {"A": Role.SHARED, "B": Role.SHARED, "head": Role.SHARED}
    one, two = (worker.train(Instruction(1, (0, 1, 3), roles, worker.loaded.model.initial)) for _ in range(2))
    assert all(np.array_equal(a.tensors[n], b.tensors[n]) for a, b in zip(one, two, strict=True) for n in a.tensors)


@pytest.mark.parametrize("name", ["rolora", "fedsvd", "s2-cyclic", "mos-personal", "s2-personal", "feddpa"])
def test_what_the_server_holds_reaches_the_clients(name: str, tmp_path: Path) -> None:
    """Two cycles of rounds through a trainer: broadcast tensors are used as they come, personal ones go on."""
    worker = tiny_worker(tmp_path, **{"strategy.name": name})
    strategy = build_strategy(worker.loaded.model.config, worker.describe().specs)
    state = strategy.initial(worker.loaded.model.initial)
    for number in range(1, 2 * strategy.period + 1):
        roles = strategy.all_roles(number)
        results = worker.train(Instruction(number, (0, 1, 3), roles, state.tensors))
        assert [result.report.reason for result in results] == ["", "", ""]
        shared = strategy.expected(number)
        assert all(result.tensors.keys() == shared.keys() for result in results)
        mean = {key: np.mean([result.tensors[key] for result in results], axis=0) for key in shared}
        before, state = state.tensors, strategy.apply(state, Reduced(3, mean), number)
        server = state.tensors
        changed = {strategy.setting.specs[key].kind for key in server if not np.array_equal(server[key], before[key])}
        assert changed == strategy.changed(number)
        again = worker.train(Instruction(number + 1, (0,), roles, {key: 1.5 * value for key, value in server.items()}))
        assert any(not np.array_equal(again[0].tensors[key], results[0].tensors[key]) for key in shared), "control"
    sums = worker.evaluate_personal(Instruction(number + 1, (0, 1, 3), strategy.all_roles(number + 1), server), "test")
    losses = {one.metrics["loss"] for one in sums}
    assert len(losses) == (3 if strategy.has_personal else 1)


def test_store_drops_what_the_server_went_back_from(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path)
    for round_number in (1, 2, 3):
        store.save(7, round_number, {"x": np.full(2, round_number, np.float32)})
    names = sorted(path.name for path in (tmp_path / "client-7").iterdir())
    assert names == ["round-3.safetensors", "round-4.safetensors"], "what round 3 started with, and what came of it"
    resumed = store.load(7, 3)
    assert resumed is not None
    assert resumed["x"].tolist() == [2, 2]
    assert [path.name for path in (tmp_path / "client-7").iterdir()] == ["round-3.safetensors"]
    assert store.load(8, 3) is None


def test_a_length_that_the_model_cannot_take(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"train.max-length": 65})
    with pytest.raises(ValueError, match=r"train.max-length = 65: the model takes 64 tokens at most"):
        worker.load()


def test_texts_that_spell_special_tokens(tmp_path: Path) -> None:
    """``[PAD]`` in a text is text, not padding: docstrings of a tokenizer are full of it."""
    from fedlora.config import ModelConfig
    from fedlora.data import Table
    from fedlora.models import load_tokenizer
    from fedlora.tasks import Classification

    for name in ("minilm", save_tiny_model(tmp_path / "model")):
        tokenizer = load_tokenizer(ModelConfig(name))
        task = Classification(tokenizer.pad_token_id)
        examples = task.encode(Table(("a [PAD] b [SEP] c", "w1"), (0, 1)), tokenizer, 16)
        assert tokenizer.pad_token_id not in examples.tokens[0]
        assert (examples.tokens[0] == tokenizer.sep_token_id).sum() == 1


def test_padding_token_inside_a_text_is_refused(tmp_path: Path) -> None:
    """pad = eos: the model would take the end of the text from the wrong place."""
    from fedlora.config import ModelConfig
    from fedlora.data import Table
    from fedlora.models import load_tokenizer
    from fedlora.tasks import Classification

    tokenizer = load_tokenizer(ModelConfig(save_tiny_model(tmp_path / "model")))
    task = Classification(pad_token_id=tokenizer.sep_token_id)
    with pytest.raises(ValueError, match="holds the padding token"):
        task.encode(Table(("w1 w2",), (0,)), tokenizer, 16)


def test_configuration_survives_the_way_to_a_trainer(tmp_path: Path) -> None:
    config = resolve(tiny_flat(tmp_path))
    assert read_config(config.to_flat()) == config


@pytest.mark.parametrize("dp", [False, True])
def test_a_probe_on_a_cpu_takes_a_few_clients_after_one(dp: bool, tmp_path: Path) -> None:
    """What it measures is by token, so a pack of thousands need not train for an estimate; nothing is paid for it."""
    packs: list[list[int]] = []

    def watched(engine: Any, works: Any, *args: Any, **more: Any) -> Any:
        packs.append([work.client for work in works])
        return train_pack(engine, works, *args, **more)

    folder = tmp_path
    config = dp_config(folder) if dp else resolve(tiny_flat(folder))
    data = load_federated(config, 6)
    job = Job(config.to_flat(), data, SiteLimits(str(folder / "sites")))
    worker = Worker(lambda: job, 1, watched)
    speed = worker.probe(replace(trainers.instruction(worker), clients=tuple(range(6)), ledger_heads=()))
    assert packs == [[0], [0, 1, 2, 3]]
    assert min(speed.train_s, speed.evaluate_s) > 0
    assert speed.measured_tokens == int(worker.loaded.model.examples["test"].cost.sum())
    assert not list((folder / "sites").glob("*/ledger.jsonl"))
