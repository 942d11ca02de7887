"""Clients of different ranks in one pack: each trains as it would alone, and padding is nowhere to be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora.config import TrainConfig
from fedlora.engine import ClientWork, Engine, evaluate, train_pack
from fedlora.engine.layers import Layout
from fedlora.engine.pack import Pack
from fedlora.local_terms import LocalTerms
from fedlora.privacy import Mechanism, PrivateRandom
from fedlora.privacy.step import PrivateStep
from fedlora.runs.export import adapter_files
from fedlora.runs.ranks import FILE, effective_ranks, read_strengths, zero_share
from tests.support.families import random_examples, small_model, without_float32
from tests.support.matrix import CONFIGS, Arrays, engine_of, random_start
from tests.test_dp_step import ragged

RANKS = (1, 3, 2)
TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
SGD = TrainConfig(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.1)
FAMILIES = pytest.mark.parametrize("family", ["bert", "gpt2", "llama-lm"])


def sliced(engine: Engine, tensors: Arrays, rank: int) -> Arrays:
    """Return tensors at a rank: the first rows of A and columns of B."""
    axes = {name: spec.rank_axis for name, spec in engine.method.specs().items()}
    return {
        name: value if axes[name] is None else np.take(value, range(rank), axes[name])  # type: ignore[arg-type]
        for name, value in tensors.items()
    }


def works_of(engine: Engine, family: str, fixed: frozenset[str] = frozenset()) -> list[ClientWork]:
    works = []
    for work, rank in zip(ragged(random_start(engine), family), RANKS, strict=True):
        start = {n: v for n, v in sliced(engine, dict(work.start), rank).items() if n not in fixed}
        works.append(replace(work, start=start))
    return works


def off(one: Any, other: Any) -> float:
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@FAMILIES
@pytest.mark.parametrize("train", [TRAIN, SGD], ids=["adamw", "sgd"])
def test_a_pack_equals_each_client_alone(family: str, train: TrainConfig) -> None:
    """Alone no number is padded; test_packing.py holds that against PEFT."""
    engine = engine_of("lora", family)
    works = [work for work in works_of(engine, family) if work.client != 1]  # whose steps have no rows
    results = train_pack(engine, works, {}, train)
    for result, work in zip(results, works, strict=True):
        alone = train_pack(engine, [work], {}, train)[0]
        assert result.error == alone.error == ""
        assert off(result.tensors, alone.tensors) < 1e-10
        assert off(result.tensors, work.start) > 1e-3, "control: it moves"
        assert all(value.flags.c_contiguous for value in result.tensors.values())


def private_of(clients: int, noise: float = 0.7) -> PrivateStep:
    mechanism = Mechanism(noise, 1.0, sample_rate=0.5, expected_batch_size=4, steps=3)
    return PrivateStep(mechanism, [PrivateRandom.reproducible(3, client, 1) for client in range(clients)])


@FAMILIES
def test_noise_is_a_clients_own(family: str) -> None:
    """With a fixed seed a client's noisy update does not depend on the ranks that it is packed with."""
    engine = engine_of("lora", family)
    works = works_of(engine, family)
    results = train_pack(engine, works, {}, TRAIN, private_of(3))
    for k, (result, work) in enumerate(zip(results, works, strict=True)):
        private = private_of(3)
        alone = train_pack(engine, [work], {}, TRAIN, PrivateStep(private.mechanism, [private.randoms[k]]))[0]
        assert off(result.tensors, alone.tensors) < 1e-10
        assert result.diagnostics == pytest.approx(alone.diagnostics)
        moved = [result.tensors[name] != value for name, value in work.start.items()]
        assert all(flags.all() for flags in moved), "every real number has noise"


def test_padding_stays_zero_and_takes_no_noise() -> None:
    engine = engine_of("lora", "bert")
    pack = Pack(engine, works_of(engine, "bert"), {}, SGD, private_of(3))
    assert pack.stack.real is not None
    for turn in pack.turns:
        grads = pack.backward(turn)
        pack.move(turn, grads)
        assert not pack.stack.values[~pack.stack.real].any()
        assert not grads[~pack.stack.real[turn.groups]].any()
    same = [replace(work, start=sliced(engine, dict(work.start), 1)) for work in works_of(engine, "bert")]
    assert Pack(engine, same, {}, SGD).stack.real is None, "equal ranks are not padded, whatever the method's rank"


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", ["A", "B"])
def test_the_other_factor_is_common(kind: str, private: bool) -> None:
    """FFA-LoRA and its mirror: a fixed factor is of the full rank, and would give padding a gradient."""
    engine = engine_of("lora", "bert")
    whole = random_start(engine)
    fixed = frozenset(name for name, spec in engine.method.specs().items() if spec.kind == kind)
    common = {name: whole[name] for name in fixed}
    works = works_of(engine, "bert", fixed)
    results = train_pack(engine, works, common, TRAIN, private_of(3) if private else None)
    for k, (result, work) in enumerate(zip(results, works, strict=True)):
        source = private_of(3)
        step = PrivateStep(source.mechanism, [source.randoms[k]]) if private else None
        alone = train_pack(engine, [work], sliced(engine, common, RANKS[k]), TRAIN, step)[0]
        assert off(result.tensors, alone.tensors) < 1e-10


def test_local_terms_at_ragged_ranks() -> None:
    engine = engine_of("lora", "bert")
    generator = np.random.default_rng(0)
    shared, works = frozenset(engine.method.specs()), []
    for work in works_of(engine, "bert"):
        variate = {name: 0.1 * generator.standard_normal(value.shape) for name, value in work.start.items()}
        works.append(replace(work, server_variate=variate, own_variate={n: 2 * v for n, v in variate.items()}))
    for terms in (LocalTerms(proximal=0.5), LocalTerms(scaffold=2), LocalTerms(penalty=0.5, decay=0.7)):
        train = replace(SGD, momentum=0.0, weight_decay=0.0)
        results = train_pack(engine, works, {}, train, terms=terms, shared=shared)
        for result, work in zip(results, works, strict=True):
            alone = train_pack(engine, [work], {}, train, terms=terms, shared=shared)[0]
            assert off(result.tensors, alone.tensors) < 1e-10
            if terms.scaffold:
                assert off(result.own_variate, alone.own_variate) < 1e-10


@pytest.mark.parametrize("family", ["bert", "llama-lm"])
def test_evaluation_with_own_tensors(family: str) -> None:
    engine = engine_of("lora", family)
    whole, examples = random_start(engine), random_examples(12, 3, family=family)
    own = [sliced(engine, {name: (1 + k) * value for name, value in whole.items()}, r) for k, r in enumerate(RANKS)]
    group = np.arange(12) % 3
    together = evaluate(engine, {}, examples, range(12), own=own, group=group)
    for k in range(3):
        rows = np.flatnonzero(group == k)
        alone = evaluate(engine, own[k], examples, rows.tolist())
        assert np.abs(together["loss"][rows] - alone["loss"]).max() < 1e-10
    fixed = {name: value for name, value in whole.items() if name.endswith("lora_A")}  # at the full rank
    rest = [{name: value for name, value in one.items() if name not in fixed} for one in own]
    mixed = evaluate(engine, fixed, examples, range(12), own=rest, group=group)
    for k in range(3):
        rows = np.flatnonzero(group == k)
        alone = evaluate(engine, {**sliced(engine, fixed, RANKS[k]), **rest[k]}, examples, rows.tolist())
        assert np.abs(mixed["loss"][rows] - alone["loss"]).max() < 1e-10


@pytest.mark.parametrize("common", [False, True], ids=["both of it", "a fixed factor of the full rank"])
def test_an_adapter_of_a_smaller_rank(common: bool, tmp_path: Path) -> None:
    """Exported as it is, whatever the method's rank."""
    engine = engine_of("lora", "bert")
    whole = random_start(engine)
    tensors = sliced(engine, whole, 2)
    if common:
        tensors |= {name: value for name, value in whole.items() if name.endswith("lora_A")}
    files = adapter_files(engine, tensors, CONFIGS["lora"])
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    batch = engine.task.collate(random_examples(6, seed=2), range(6), torch.device("cpu"))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    at_rank = {name: engine.tensor(value) for name, value in sliced(engine, whole, 2).items()}
    with torch.no_grad(), engine.grouped.placed(engine.method.factors(at_rank), Layout(1, 6, None)) as model:
        expected = model(**inputs).logits
    loaded = PeftModel.from_pretrained(without_float32(small_model("bert")), str(tmp_path)).double().eval()
    assert loaded.peft_config["default"].r == 2
    with torch.no_grad():
        assert float((loaded(**inputs).logits - expected).abs().max()) < 1e-10


def test_strengths_of_adapters_of_different_ranks(tmp_path: Path) -> None:
    engine = engine_of("lora", "bert")
    for k, rank in enumerate(RANKS):
        folder = tmp_path / "adapters" / str(k)
        folder.mkdir(parents=True)
        files = adapter_files(engine, sliced(engine, random_start(engine), rank), CONFIGS["lora"])
        (folder / FILE).write_bytes(files[FILE])
    strengths = read_strengths(tmp_path)
    assert all(values.shape == (3, 3) for values in strengths.values())
    assert effective_ranks(strengths).tolist() == [2.0] * 4
    assert zero_share(strengths) == 0.0, "a rank that a client does not have is not one that it leaves at zero"
