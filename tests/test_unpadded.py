"""Blocks on tokens side by side: what they give is what padded rows give, and a model that mixes rows is found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.config import Config, MethodConfig
from fedlora.engine import Batching, Engine, apart, evaluate, fast, find_batching, train_pack, trial
from fedlora.engine.apart import random_tensors
from fedlora.engine.blocks import checkpoint_blocks
from fedlora.engine.kernels import attention
from fedlora.engine.layout import Layout, Unpadded
from fedlora.engine.rounding import rounded_blocks
from fedlora.methods import build_method, initial_tensors
from fedlora.models import prepare_base
from fedlora.seeded import Seeded
from tests.support.families import FAMILIES, random_examples, small_model, small_task
from tests.support.matrix import random_start
from tests.test_dp_step import private_step
from tests.test_packing import ADAMW, make_engine, make_works
from tools import families
from tools.model_table import engine_of

CPU = torch.device("cpu")


def tried(engine: Engine) -> Engine:
    """Return the engine with its blocks unpadded, where the trial of every load finds nothing wrong with it."""
    tensors = random_start(engine)
    return trial.tried(engine, fast.without_padding, tensors, trial.Plain.of(engine, tensors))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dp", [False, True])
def test_training_is_the_padded_one(family: str, dp: bool) -> None:
    engine, other = make_engine(family), tried(make_engine(family))
    assert other.grouped.unpadded, "a family that does not bear it"
    private = (lambda: private_step(4)) if dp else (lambda: None)
    one, two = (
        train_pack(way, make_works(way, 4, ADAMW, family=family), {}, ADAMW, private()) for way in (engine, other)
    )
    rounding = 1e-16 / 1e-8 * ADAMW.learning_rate * 4  # of rows of one key, see test_packing
    for a, b in zip(one, two, strict=True):
        assert a.error == b.error
        assert a.loss == pytest.approx(b.loss, abs=1e-12)
        assert all(np.abs(a.tensors[n] - b.tensors[n]).max() < 1e-10 + rounding for n in a.tensors)
    rows, own = random_examples(12, 3, family=family), [random_tensors(random_start(engine), g) for g in range(3)]
    facts = [evaluate(way, {}, rows, range(12), own=own, group=np.arange(12) % 3) for way in (engine, other)]
    assert all(np.abs(facts[0][name] - facts[1][name]).max() < 1e-10 for name in facts[0])


def test_no_padding_enters_a_block() -> None:
    engine, seen = tried(make_engine("bert")), []
    block = engine.grouped.unpadded[-1]
    works = make_works(engine, 3, ADAMW)
    handle = block.register_forward_pre_hook(lambda _module, given: seen.append(given[0].shape[:2]))
    train_pack(engine, works, {}, ADAMW)
    handle.remove()
    assert {shape[0] for shape in seen} == {1}
    assert sum(shape[1] for shape in seen) == sum(int(w.examples.cost[b].sum()) for w in works for b in w.batches)


UNPADDED = {
    "ALBERT",
    "BERT",
    "CamemBERT",
    "DistilBERT",
    "ELECTRA",
    "ERNIE",
    "RoBERTa",
    "XLM-RoBERTa",
    "Gemma",
    "GPT-2",
    "GPT-NeoX",
    "Granite",
    "Llama",
    "Mixtral",
    "OLMo 2",
    "OPT",
    "Phi",
    "Phi-3",
    "Qwen 2",
    "Qwen 3",
    "StableLM",
    "StarCoder 2",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_which_families_bear_it(family: str) -> None:
    """Those that do keep rows apart as they did; attention with windows, biases or code of its own stays padded."""
    engine = tried(engine_of(family)[0])
    assert bool(engine.grouped.unpadded) == (family in UNPADDED)
    if family in UNPADDED:
        assert find_batching(engine, initial_tensors(engine.method.specs(), Seeded(0))) == Batching()


class Changed(nn.Module):
    """A block whose output is changed by a function of it."""

    def __init__(self, block: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.block, self.change = block, change

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.block(hidden_states, *args, **kwargs))


def planted(change: Callable[[torch.Tensor], torch.Tensor]) -> Engine:
    engine = make_engine("bert")
    layers: Any = engine.base.model.get_submodule("bert.encoder.layer")
    for number, block in enumerate(layers):
        layers[number] = Changed(block, change)
    return engine


def leak(hidden: torch.Tensor) -> torch.Tensor:
    """Let a token see a little of the one before it, of whatever row."""
    before = hidden.roll(1, 1) * (torch.arange(hidden.shape[1]) > 0)[:, None]
    return hidden + (0.01 * before).to(hidden.dtype)


def test_a_weak_leak_from_row_to_row_is_seen_in_float32_and_not_in_bfloat16() -> None:
    """So that it is a rehearsal in float32 which decides."""
    assert tried(in_precision(planted(leak))).grouped.unpadded, "what 16 bits show is too coarse"
    assert not tried(in_precision(planted(leak), torch.float32)).grouped.unpadded


def blown_up(hidden: torch.Tensor) -> torch.Tensor:
    """Make a large difference of any, as a deep and wide model does."""
    return torch.sin(1000.0 * hidden.float()).to(hidden.dtype)


def mixed(hidden: torch.Tensor) -> torch.Tensor:
    """The mean over positions is without padding that of all rows."""
    return hidden + 10.0 * hidden.mean(1, keepdim=True)


def in_precision(engine: Engine, dtype: torch.dtype = torch.bfloat16) -> Engine:
    engine.base.model.to(dtype)
    return replace(engine, compute=dtype, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "change", "tolerance"),
    [
        (torch.bfloat16, mixed, 0.05),
        (torch.bfloat16, blown_up, 0.25),
        (torch.float32, blown_up, 1e-4),  # roundings are small whatever is made of them
    ],
)
def test_how_far_off_a_fast_way_may_be_goes_by_what_the_model_makes_of_a_rounding(
    dtype: torch.dtype, change: Callable[[torch.Tensor], torch.Tensor], tolerance: float
) -> None:
    engine = in_precision(planted(change), dtype)
    plain = trial.Plain.of(engine, random_start(engine))
    assert plain.tolerances[1] == tolerance
    assert plain.strength == 1.0  # weaker adapters do not help a model that makes much of a rounding by itself


def test_losses_and_gradients_have_a_tolerance_each() -> None:
    """Three times what a rounding moves them by: gradients of these blocks by some per cent, losses by less."""
    engine = in_precision(planted(lambda hidden: torch.sin(12.0 * hidden.float()).to(hidden.dtype)))
    start = random_start(engine)
    plain = trial.Plain.of(engine, start)
    with rounded_blocks(engine):
        moved = trial._apart(trial.numbers(engine, start), plain.numbers)
    assert plain.tolerances[1] == pytest.approx(3 * moved[1])
    assert 0.05 < plain.tolerances[1] < 0.25
    assert plain.tolerances[0] < plain.tolerances[1]


def test_gradients_that_are_no_numbers_are_not_taken_for_right(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("bert")
    start = random_start(engine)
    plain = trial.Plain.of(engine, start)
    monkeypatch.setattr(trial, "numbers", lambda *_: (plain.numbers[0], plain.numbers[1] * np.nan))
    assert not trial.tried(engine, fast.without_padding, start, plain).grouped.unpadded


def test_what_is_wrong_is_found_whatever_is_made_of_a_rounding() -> None:
    engine = in_precision(planted(mixed))
    start = random_start(engine)
    plain = replace(trial.Plain.of(engine, start), tolerances=(0.25, 0.25))
    assert not trial.tried(engine, fast.without_padding, start, plain).grouped.unpadded


def test_passes_without_padding_are_full() -> None:
    engine = replace(tried(make_engine("bert")), max_cost=100)
    cost = np.array([5, 60, 7, 30, 90, 3, 3, 2, 101])
    passes = engine.passes(cost, np.zeros(9, dtype=np.int64))
    assert [part.tolist() for part in passes] == [[0, 1, 2], [3], [4, 5, 6, 7], [8]]


def test_a_long_row_does_not_blow_up_what_is_outside_of_the_blocks() -> None:
    engine = replace(tried(make_engine("bert")), max_cost=100)
    cost = np.array([90, *[1] * 30])
    assert [len(part) for part in engine.passes(cost, np.zeros(31, dtype=np.int64))] == [4, 27]
    assert len(engine.passes(cost[::-1].copy(), np.zeros(31, dtype=np.int64))) == 2
    padded = engine.passes(cost, np.zeros(31, dtype=np.int64), padded=True)
    assert [len(part) for part in padded] == [1, 30]


def test_checkpointed_blocks_without_padding_train_the_same() -> None:
    engine, other = make_engine("llama-lm"), tried(make_engine("llama-lm"))
    assert checkpoint_blocks(other)
    one, two = (train_pack(way, make_works(way, 3, ADAMW, family="llama-lm"), {}, ADAMW) for way in (engine, other))
    assert all(
        np.abs(a.tensors[n] - b.tensors[n]).max() < 1e-9 for a, b in zip(one, two, strict=True) for n in a.tensors
    )


def test_a_model_whose_blocks_mix_positions_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    engine = planted(mixed)
    assert not tried(engine).grouped.unpadded
    assert "without_padding: the plain way computes, the fast one is off by" in caplog.text


def test_a_window_of_attention_stays_padded(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine("mistral-lm")
    config: Any = engine.base.model.config
    config.sliding_window = 4
    assert not tried(engine).grouped.unpadded
    assert "attention of another kind than causal or two-sided" in caplog.text
    assert config._attn_implementation == "sdpa"


def test_cudnn_is_off_while_any_thread_wants_it_so() -> None:
    """A CPU's trainers have threads, and the switch is one for all: the first to leave must not switch it on."""
    engine = make_engine("bert")
    factors = engine.method.factors({n: torch.tensor(v) for n, v in random_start(engine).items()})

    def switched() -> bool:
        return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]

    assert switched()
    one, other = (
        attention.without_cudnn(),
        engine.grouped.placed(factors, Layout.of(np.zeros(1, int), 1, engine.device)),
    )
    with one:
        with other:
            assert not switched()
        assert not switched()
    first, second = attention.without_cudnn(), attention.without_cudnn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not switched()
    second.__exit__(None, None, None)
    assert switched()


def test_attention_forgets_the_batch_behind_an_error() -> None:
    rows = attention.Rows.of(np.array([0, 2, 3]), 2, CPU)
    with pytest.raises(KeyError), attention.rows_in_place(rows):
        raise KeyError
    assert (
        attention.mask(batch_size=1, q_length=3, kv_length=3, attention_mask=torch.tensor([[1, 1, 0]]).bool())
        is not None
    )


def test_tokens_go_and_come_back() -> None:
    lengths, groups = np.array([3, 1, 2]), np.array([0, 0, 1])
    batch = Unpadded.of(lengths, groups, 2, CPU)
    x = torch.randn(3, 3, 4)
    own = torch.arange(3) < torch.from_numpy(lengths)[:, None]
    packed = batch.pack(x)
    assert torch.equal(packed[0], x[own])
    assert torch.equal(batch.unpack(packed), x * own[..., None])
    assert torch.equal(batch.pack(x[:1])[0], x[:1].expand(3, -1, -1)[own])
    assert batch.layout.of_rows(packed, batch.layout.rows)
    assert batch.rows.start.tolist() == [0, 3, 4, 6]
    assert torch.equal(batch.layout.to_rows(batch.layout.to_groups(packed), packed), packed)
    assert torch.equal(batch.layout.to_groups(packed)[1, :2], packed[0, 4:])
    whole = Unpadded.of(np.array([3, 3]), np.array([0, 1]), 2, CPU)
    assert whole.kept is None
    assert torch.equal(whole.unpack(whole.pack(x[:2])), x[:2])
    assert isinstance(whole.layout, Layout)


def overwhelming(family: str, layers: int, alpha: float) -> Engine:
    """In 16 bits, with an update far larger than what its layer puts out itself."""
    model = small_model(family, num_hidden_layers=layers)
    base = prepare_base(model, None, "all-linear", has_head=True, device=torch.device("cpu"))
    lora = Config(method=MethodConfig("lora", rank=8, alpha=alpha))
    method = build_method(lora, base.structure.adapted, base.structure.head)
    return in_precision(Engine.build(base, method, small_task(family)))


def test_fast_ways_are_tried_with_weaker_adapters_where_a_rounding_would_hide_an_error() -> None:
    engine = overwhelming("bert", 2, 4e3)
    start = random_start(engine)
    strong = trial.numbers(engine, start)
    with rounded_blocks(engine):
        assert 3 * max(trial._apart(trial.numbers(engine, start), strong)) > 0.25
    plain = trial.Plain.of(engine, start)
    assert plain.strength < 1.0
    assert max(plain.tolerances) < 0.25
    assert trial.tried(engine, fast.without_padding, start, plain).grouped.unpadded


def test_rows_are_tried_with_weaker_adapters_where_a_rounding_looks_like_an_error() -> None:
    """RandLoRA of alpha 20 r was not let rows of unlike length together on a GPU, and trained at a fifteenth."""
    engine = overwhelming("roberta", 6, 200.0)
    start = random_start(engine)
    rows, own = engine.task.made_up_rows(long=True), [random_tensors(start, "group", g) for g in range(2)]
    exact = apart._alone(engine, rows, own)
    with rounded_blocks(engine):  # as on a GPU, where products round otherwise in another batch
        assert np.abs(apart._alone(engine, rows, own) - exact).max() > 0.05  # what counts as an error
        assert find_batching(engine, start) == Batching()


def test_adapters_stay_strong_where_it_is_the_model_that_makes_much_of_a_rounding() -> None:
    engine = in_precision(planted(lambda hidden: torch.sin(300.0 * hidden.float()).to(hidden.dtype)))
    start = random_start(engine)
    own, _ = apart._own(engine, engine.task.made_up_rows(long=True), start, apart._COARSE)
    assert all(np.array_equal(own[0][name], value) for name, value in random_tensors(start, "group", 0).items())
