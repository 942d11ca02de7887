"""The fast ways: tried against the plain one, and left where a model does not take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.engine import ClientWork, Engine, evaluate, fast, train_pack
from fedlora.engine.blocks import blocks_of, checkpoint_blocks
from fedlora.engine.fast import like, settle
from fedlora.engine.kernels import low_rank
from fedlora.engine.pack import Pack
from fedlora.engine.trial import Plain, tried
from fedlora.methods import DualLora, build_method
from fedlora.models import prepare_base
from tests.support.families import LANGUAGE, random_examples, small_model, small_task, task_of, without_float32
from tests.support.matrix import CONFIGS, engine_of, random_start
from tests.test_dp_step import private_step
from tests.test_packing import ADAMW, make_engine, make_works

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def apart(engine: Engine, other: Engine, family: str) -> float:
    one, two = (train_pack(way, make_works(engine, 4, ADAMW, family=family), {}, ADAMW) for way in (engine, other))
    assert [result.error for result in two] == [result.error for result in one]
    return max(
        float(np.abs(a.tensors[n] - b.tensors[n]).max()) for a, b in zip(one, two, strict=True) for n in a.tensors
    )


def test_a_way_that_cannot_be_tried_leaves_the_plain_one() -> None:
    """Such as a kernel that does not compile here, or has no memory for its trial."""
    engine = make_engine("bert")
    tensors = random_start(engine)

    def fails(_: Engine) -> Any:
        raise torch.OutOfMemoryError("no memory for the trial")

    assert tried(engine, fails, tensors, Plain.of(engine, tensors)) is engine


@pytest.mark.parametrize("family", LANGUAGE)
def test_answers_alone_meet_the_output_layer(family: str) -> None:
    engine = make_engine(family)
    settled = settle(engine, random_start(engine))
    assert settled.less_memory
    assert like(make_engine(family), settled).less_memory
    rounding = 1e-16 / 1e-8 * ADAMW.learning_rate * 4  # of rows of one key, see test_packing
    assert apart(engine, settled, family) < 1e-10 + rounding
    rows = random_examples(12, 3, family=family)
    one, two = (evaluate(way, random_start(engine), rows, range(12)) for way in (engine, settled))
    for name, values in one.items():
        assert np.abs(values - two[name]).max() < 1e-10


def test_the_kernel_is_tried_on_what_it_computes(caplog: pytest.LogCaptureFixture) -> None:
    """DoRA's A and B, not VeRA's, which all clients have in common; ranks above its room leave the plain way."""
    assert fast._low_rank_shapes(engine_of("dora", "bert")) == [(16, 16, 3)]
    assert fast._low_rank_shapes(engine_of("vera", "bert")) == []
    engine = engine_of("dual-lora", "bert")
    wide = DualLora(engine.base.structure.adapted, rank=low_rank.MOST_RANKS // 2 + 1, alpha=16.0, mix=0.5)
    with caplog.at_level("INFO"):
        assert fast._with_kernel(replace(engine, method=wide, compute=torch.bfloat16)) is None
    assert "has room for rank 256" in caplog.text


class Capped(nn.Module):
    """An output layer whose logits the model caps afterwards, as Gemma 2 does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output


def test_a_model_that_does_more_with_its_logits_keeps_the_plain_way(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine("llama-lm")
    model: Any = Capped(engine.grouped.model)
    model.get_decoder, model.get_output_embeddings = model.model.get_decoder, model.model.get_output_embeddings
    engine.grouped.model = model
    capped = replace(engine, base=replace(engine.base, model=model))
    settled = settle(capped, random_start(engine))
    assert not settled.less_memory
    assert "less_memory: the plain way computes, the fast one is off by" in caplog.text


def test_an_adapted_output_layer_keeps_the_plain_way() -> None:
    engine = make_engine("llama-lm", targets="q_proj,lm_head")
    assert not settle(engine, random_start(engine)).less_memory


@pytest.mark.parametrize("family", ["bert", "llama-lm", "gpt2"])
def test_checkpointed_blocks_train_the_same(family: str) -> None:
    """B among it, which stays at zero where a backward pass runs without its factors."""
    engine, other = make_engine(family), make_engine(family)
    assert len(blocks_of(other)) == len({type(block) for block in blocks_of(other)}) * 2
    assert checkpoint_blocks(other)
    assert not checkpoint_blocks(other), "nothing more can be done"
    assert apart(engine, other, family) < 1e-12
    work = make_works(other, 1, ADAMW, family=family)[0]
    (result,) = train_pack(other, [work], {}, ADAMW)
    assert all(np.abs(value).max() > 0 for name, value in result.tensors.items() if name.endswith("lora_B"))


def short_once(monkeypatch: pytest.MonkeyPatch, task: type, method: str) -> None:
    """Have a method of a task run out of memory when it is called for the second time."""
    whole, passed = getattr(task, method), 0

    def call(self: Any, model: Any, batch: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == 2:
            raise torch.OutOfMemoryError("planted")
        return whole(self, model, batch)

    monkeypatch.setattr(task, method, call)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("dp", [False, True])
def test_a_turn_that_does_not_fit_is_repeated_in_halves(dp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs short in the middle of a turn, some rows of which are added up already."""
    engine = engine_of("lora", "bert")
    works = [ClientWork(k, random_examples(8, k), 8, [np.arange(8)] * 2, random_start(engine)) for k in range(2)]
    private = (lambda: private_step(2)) if dp else (lambda: None)
    expected = train_pack(replace(engine, max_cost=40), works, {}, ADAMW, private())
    short_once(monkeypatch, type(engine.task), "row_losses")
    short = replace(engine, max_cost=40)
    found = train_pack(short, works, {}, ADAMW, private())
    assert (short.shortages, short.room) == ([40], 20)
    for one, two in zip(expected, found, strict=True):
        assert one.loss == pytest.approx(two.loss)
        assert all(np.abs(value - two.tensors[name]).max() < 1e-10 for name, value in one.tensors.items())
        assert one.diagnostics == pytest.approx(two.diagnostics)


def test_an_evaluation_that_does_not_fit_is_repeated_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = replace(engine_of("lora", "bert"), max_cost=40)
    rows, start = random_examples(12, 3), random_start(engine)
    expected = evaluate(engine, start, rows, range(12))
    short_once(monkeypatch, type(engine.task), "row_metrics")
    short = replace(engine)
    found = evaluate(short, start, rows, range(12))
    assert (short.shortages, short.room) == ([40], 20)
    assert all(np.abs(values - found[name]).max() < 1e-10 for name, values in expected.items())


def test_memory_that_is_short_for_one_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("lora", "bert")

    def row_losses(*_: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(type(engine.task), "row_losses", row_losses)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    work = ClientWork(0, random_examples(2, 0), 2, [np.arange(2)], random_start(engine))
    pack = Pack(engine, [work], {}, ADAMW)
    with pytest.raises(torch.OutOfMemoryError):
        pack.backward(next(pack.turns))
    assert engine.grouped.checkpointed, "tried before it was given up"


# -- on a GPU ---------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize(
    ("family", "method", "compiled"),
    [
        ("bert", "lora", True),
        ("llama-lm", "lora", True),
        ("roberta", "mos", False),
        ("llama-lm", "s2-lora", False),
        ("bert", "dora", True),
        ("llama-lm", "vera", True),
        ("llama-lm", "flylora", True),
        ("bert", "mora", True),
    ],
)
def test_the_fast_ways_of_a_gpu_train_as_the_plain_one(family: str, method: str, compiled: bool) -> None:
    """Loss by loss over 50 steps of AdamW in bfloat16, beside the plain way in float32."""
    engines = []
    for dtype in (torch.float32, torch.bfloat16):
        base = prepare_base(
            without_float32(small_model(family)).to(dtype),
            None,
            "auto",
            has_head=task_of(family).has_head,
            device=torch.device("cuda"),
        )
        built = build_method(CONFIGS[method], base.structure.adapted, base.structure.head)
        engines.append(Engine.build(base, built, small_task(family)))
    settled = settle(engines[1], random_start(engines[1]), compiled=compiled)
    assert settled.kernels
    assert bool(settled.grouped.blocks) == compiled
    assert settled.grouped.unpadded
    for step in (1, 10, 50):
        losses = []
        for engine in (engines[0], settled):
            works = [
                ClientWork(k, random_examples(6, k, family=family), 6, [np.arange(6)] * step, random_start(engine))
                for k in range(3)
            ]
            results = train_pack(engine, works, {}, replace(ADAMW, learning_rate=1e-3))
            assert [result.error for result in results] == [""] * 3
            losses.append([result.loss for result in results])
        assert losses[1] == pytest.approx(losses[0], rel=0.03)
