"""The trainer and the clients' private tensors, in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.personal import PersonalStore
from clients.pool import split_packs
from clients.trainer import Job, Request, Trainer
from fedlora.data import load_federated
from fedlora.plugins import read_config
from fedlora.roles import Role
from simulations.setup import build_strategy, plan_shards, resolve
from tests.support.tiny import save_texts, save_tiny_model


def tiny_flat(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model.name": save_tiny_model(folder / "model"),
        "data.name": "file",
        "data.path": save_texts(folder / "texts.csv"),
        "federation.num-clients": 4,
        "engine.dtype": "float64",
        "train.batch-size": 4,
        "train.local-steps": 3,
        "rounds": 2,
        "method.rank": 2,
        "mos.budget": 2,
        "mos.shards": 2,
        **changes,
    }


def tiny_trainer(folder: Path, **changes: Any) -> Trainer:
    config = resolve(tiny_flat(folder, **changes))
    job = Job(config.to_flat(), load_federated(config, 4), str(folder / "sites"))
    return Trainer(lambda: job, 1)


ROLES = {"A": Role.FROZEN, "B": Role.SHARED, "head": Role.PERSONAL}


def request(trainer: Trainer, clients: tuple[int, ...], round_number: int = 1, **changes: Any) -> Request:
    assert trainer.loaded
    tensors = {name: value for name, value in trainer.initial.items() if name.endswith("lora_B")}
    return Request(round_number, clients, ROLES, {**tensors, **changes})


def test_the_base_is_loaded_once(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    assert trainer.describe().base_loads == 1
    trainer.train(request(trainer, (0, 1)))
    trainer.evaluate(trainer.initial, "test", [0, 1, 2])
    assert trainer.describe().base_loads == 1


def test_only_shared_tensors_leave(tmp_path: Path) -> None:
    """Neither the frozen A nor the private head is in a client's result."""
    trainer = tiny_trainer(tmp_path, **{"method.head": "personal"})
    results = trainer.train(request(trainer, (0, 2)))
    assert [result.client for result in results] == [0, 2]
    assert all(result.error == "" and all(name.endswith("lora_B") for name in result.tensors) for result in results)


def test_private_heads_stay_and_go_on(tmp_path: Path) -> None:
    """A client goes on with its own head; another's, and what a repeated round leaves, are not mixed in."""
    trainer = tiny_trainer(tmp_path, **{"method.head": "personal"})
    store = trainer.personal
    trainer.train(request(trainer, (0, 1)))
    heads = [store.load(client, 2) for client in (0, 1)]
    assert heads[0] is not None
    assert heads[1] is not None
    assert set(heads[0]) == {"classifier.weight", "classifier.bias"}
    assert not np.array_equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])
    assert store.load(3, 2) is None
    trainer.train(request(trainer, (0, 1), 2))
    later = store.load(0, 3)
    assert later is not None
    assert not np.array_equal(later["classifier.weight"], heads[0]["classifier.weight"])
    repeated = tiny_trainer(tmp_path, **{"method.head": "personal"})
    repeated.train(request(repeated, (0, 1), 2))
    again = store.load(0, 3)
    assert again is not None
    assert np.array_equal(again["classifier.weight"], later["classifier.weight"])


def test_personal_evaluation_uses_the_clients_own_head(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **{"method.head": "personal", "train.learning-rate": 0.3})
    before = trainer.evaluate_personal(request(trainer, (0, 1, 2, 3)))
    trainer.train(request(trainer, (0, 1)))
    after = trainer.evaluate_personal(request(trainer, (0, 1, 2, 3), 2))
    assert [part["examples"] for part in before] == [len(held) for held in trainer.data.holdout]
    assert before[0]["loss"] != after[0]["loss"]
    assert before[2:] == after[2:]


def test_repeating_a_pack_gives_the_same_bits(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    roles = {"A": Role.SHARED, "B": Role.SHARED, "head": Role.SHARED}
    assert trainer.loaded
    one, two = (trainer.train(Request(1, (0, 1, 3), roles, trainer.initial)) for _ in range(2))
    assert all(np.array_equal(a.tensors[n], b.tensors[n]) for a, b in zip(one, two, strict=True) for n in a.tensors)


@pytest.mark.parametrize("name", ["rolora", "fedsvd", "s2-cyclic", "mos-private", "s2-private"])
def test_what_the_server_holds_reaches_the_clients(name: str, tmp_path: Path) -> None:
    """Two cycles of rounds through a trainer: broadcast tensors are used as they come, private ones go on."""
    trainer = tiny_trainer(tmp_path, **{"strategy.name": name})
    strategy = build_strategy(trainer.loaded.config, trainer.describe().specs)
    server = {key: np.asarray(value) for key, value in strategy.initial(trainer.initial).items()}
    for number in range(1, 2 * strategy.period + 1):
        roles = strategy.all_roles(number)
        results = trainer.train(Request(number, (0, 1, 3), roles, server))
        assert [result.error for result in results] == ["", "", ""]
        shared = strategy.exchanged(number, Role.SHARED)
        assert all(result.tensors.keys() == shared.keys() for result in results)
        mean = {key: np.mean([result.tensors[key] for result in results], axis=0) for key in shared}
        before, server = server, {k: np.asarray(v) for k, v in strategy.combine(server, mean, number).items()}
        changed = {strategy.setting.specs[key].kind for key in server if not np.array_equal(server[key], before[key])}
        assert changed == strategy.changed(number)
        again = trainer.train(Request(number + 1, (0,), roles, {key: 0.0 * value for key, value in server.items()}))
        assert any(not np.array_equal(again[0].tensors[key], results[0].tensors[key]) for key in shared), "control"
    sums = trainer.evaluate_personal(Request(number + 1, (0, 1, 3), strategy.all_roles(number + 1), server), "test")
    losses = {one["loss"] for one in sums}
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


def test_packs() -> None:
    assert split_packs([3, 1, 2, 0, 4], 2, 9) == [(0, 1), (2, 3), (4,)]
    assert split_packs(range(10), 0, 4) == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9,)]
    assert split_packs([5], 0, 3) == [(5,)]
    assert len(split_packs(range(1000), 0, 2)) == 16, "64 clients a pack at most"


@pytest.mark.parametrize(
    ("resources", "wanted", "trainers", "threads", "gpus"),
    [
        ({"CPU": 2}, 0, 1, 2, 0.0),
        ({"CPU": 1}, 0, 1, 1, 0.0),
        ({"CPU": 16}, 0, 4, 4, 0.0),
        ({"CPU": 16}, 2, 2, 8, 0.0),
        ({"CPU": 16, "GPU": 1}, 0, 1, 16, 1.0),
        ({"CPU": 32, "GPU": 2}, 4, 4, 8, 0.5),
        ({"CPU": 32, "GPU": 2}, 3, 3, 10, 0.5),
        ({"CPU": 32, "GPU": 1}, 7, 7, 4, 0.1428),
        ({"CPU": 2}, 3, 3, 1, 0.0),
    ],
)
def test_shards(resources: dict[str, float], wanted: int, trainers: int, threads: int, gpus: float) -> None:
    shards = plan_shards(resources, wanted)
    assert len(shards) == trainers
    assert {(shard.threads, shard.gpus) for shard in shards} == {(threads, gpus)}


def test_a_length_that_the_model_cannot_take(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **{"train.max-length": 65})
    with pytest.raises(ValueError, match=r"train.max-length = 65: the model takes 64 tokens at most"):
        trainer.describe()


def test_texts_that_spell_special_tokens(tmp_path: Path) -> None:
    """``[PAD]`` in a text is text, not padding: docstrings of a tokenizer are full of it."""
    from fedlora.data import Table
    from fedlora.models import load_tokenizer
    from fedlora.tasks import Classification

    for name in ("minilm", save_tiny_model(tmp_path / "model")):
        tokenizer = load_tokenizer(name)
        task = Classification(tokenizer.pad_token_id)
        examples = task.encode(Table(("a [PAD] b [SEP] c", "w1"), (0, 1)), tokenizer, 16)
        assert tokenizer.pad_token_id not in examples.tokens[0]
        assert (examples.tokens[0] == tokenizer.sep_token_id).sum() == 1


def test_padding_token_inside_a_text_is_refused(tmp_path: Path) -> None:
    """pad = eos: the model would take the end of the text from the wrong place."""
    from fedlora.data import Table
    from fedlora.models import load_tokenizer
    from fedlora.tasks import Classification

    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    task = Classification(pad_token_id=tokenizer.sep_token_id)
    with pytest.raises(ValueError, match="holds the padding token"):
        task.encode(Table(("w1 w2",), (0,)), tokenizer, 16)


def test_configuration_survives_the_way_to_a_trainer(tmp_path: Path) -> None:
    config = resolve(tiny_flat(tmp_path))
    assert read_config(config.to_flat()) == config
