"""A healthy client whose rows give some tensor no gradient is not refused; a bug that has the same symptoms is.

Each case is checked for what it claims: that the gradient is zero, or rounding, on the client's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.config import ModelConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.engine import pack as pack_module
from fedlora.engine.optimizers import build_optimizer
from fedlora.engine.pack import Pack
from fedlora.engine.probe import probe
from fedlora.engine.watch import is_stuck, negligible
from fedlora.methods import LowRank, TensorSpec, build_method
from fedlora.models import load_base, prepare_base
from fedlora.tasks import Classification, Examples
from tests.support.families import random_examples, small_model, small_task, without_float32
from tests.support.matrix import CONFIGS, Arrays, Changed, engine_of, random_start
from tests.test_dp_step import private_step

ADAMW = TrainConfig(learning_rate=0.02)
SGD = TrainConfig(optimizer="sgd", learning_rate=0.5)


def engine_on(model: Any, family: str, targets: str, dtype: torch.dtype = torch.float64) -> Engine:
    """Return an engine with LoRA on a model that has been tampered with."""
    task = small_task(family)
    base = prepare_base(
        without_float32(model.to(dtype)), None, targets, has_head=task.has_head, device=torch.device("cpu")
    )
    return Engine.build(base, build_method(CONFIGS["lora"], base.structure.adapted, base.structure.head), task)


def work_of(start: Arrays, examples: Examples, steps: int = 1) -> ClientWork:
    return ClientWork(0, examples, len(examples), [np.arange(len(examples))] * steps, start)


def gradients(engine: Engine, work: ClientWork) -> dict[str, float]:
    """Return each tensor's largest gradient on the client's rows, as a share of the largest of all."""
    pack = Pack(engine, [work], {}, ADAMW)
    grads = pack.backward(next(pack.turns))
    peaks = {name: float(grads[:, place].abs().max()) for name, place in pack.stack.places.items()}
    return {name: peak / max(*peaks.values(), 1e-300) for name, peak in peaks.items()}


def one_key() -> tuple[Engine, Arrays, Examples, str]:
    """Rows of two tokens: the answer is predicted from one position, whose attention has a single key."""
    engine = engine_of("lora", "llama-lm")
    rows = tuple(np.array([3 + n, 9 + n], dtype=np.int64) for n in range(3))
    return engine, random_start(engine), Examples(rows, (np.array([False, True]),) * 3), "q_proj.lora_B"


def one_short_row() -> tuple[Engine, Arrays, Examples, str]:
    """A single row of a single token."""
    engine = engine_of("lora", "bert")
    examples = Examples((np.array([5], dtype=np.int64),), np.zeros(1, dtype=np.int64))
    return engine, random_start(engine), examples, "query.lora_A"


def dead_relu(targets: str = "intermediate.dense,output.dense") -> tuple[Engine, Arrays, Examples, str]:
    """No unit of the feed-forward layers fires on any row."""
    model = small_model("bert", hidden_act="relu")
    for name, parameter in model.named_parameters():
        if name.endswith("intermediate.dense.bias"):
            parameter.data.fill_(-1e3)
    engine = engine_on(model, "bert", targets)
    return engine, random_start(engine), random_examples(4, 1), "layer.1.output.dense.lora_B"


def dead_relu_before_the_adapter() -> tuple[Engine, Arrays, Examples, str]:
    """The adapted layer's input is zero on every row that there can be."""
    return dead_relu("output.dense")


def saturated_attention() -> tuple[Engine, Arrays, Examples, str]:
    """Scores so far apart that each token attends to exactly one."""
    model = small_model("bert")
    for name, parameter in model.named_parameters():
        if name.endswith(("query.weight", "key.weight")):
            parameter.data.mul_(1e4)
    engine = engine_on(model, "bert", "query,value")
    return engine, random_start(engine), random_examples(4, 1), "query.lora_A"


def saturated_head() -> tuple[Engine, Arrays, Examples, str]:
    """All rows are of the class that the head is certain of: no gradient at all."""
    engine = engine_of("lora", "bert")
    start = {**random_start(engine), "classifier.bias": np.array([1e4, 0.0, 0.0])}
    return engine, start, Examples(random_examples(4, 1).tokens, np.zeros(4, dtype=np.int64)), "classifier.weight"


def zero_padded_rank() -> tuple[Engine, Arrays, Examples, str]:
    """Rank 1 in tensors of rank 3: two ranks are zero in A and in B, and stay so."""
    engine = engine_of("lora", "bert")
    start = random_start(engine)
    for name, spec in engine.method.specs().items():
        if spec.rank_axis is not None:
            np.moveaxis(start[name], spec.rank_axis, 0)[1:] = 0.0
    return engine, start, random_examples(4, 1), ""


CASES = [
    one_key,
    one_short_row,
    dead_relu,
    dead_relu_before_the_adapter,
    saturated_attention,
    saturated_head,
    zero_padded_rank,
]
Case = Callable[[], tuple[Engine, Arrays, Examples, str]]


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_healthy_client_is_not_refused(case: Case, steps: int, private: bool) -> None:
    engine, start, examples, silent = case()
    work = work_of(start, examples, steps)
    shares = gradients(engine, work)
    claimed = [share for name, share in shares.items() if silent and name.endswith(silent)]
    assert all(share < negligible(engine) for share in claimed), "control: there is no gradient to be seen"
    assert bool(claimed) == bool(silent)
    assert train_pack(engine, [work], {}, ADAMW, private_step(1) if private else None)[0].error == ""


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "times zero": lambda x: x * 0,
    "detached, plus zero times itself": lambda x: x.detach() + 0 * x,
    "detached, plus rounding": lambda x: x.detach() + 1e-17 * x,
    "a gradient that cancels but for rounding": lambda x: x.detach() + (x / 3 * 3 - x),
    "detached": lambda x: x.detach(),
}


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("case", [one_key, saturated_head])
@pytest.mark.parametrize("bug", ADAPTERS)
def test_a_bug_cannot_hide_among_innocent_zeros(bug: str, case: Case, side: str, steps: int, private: bool) -> None:
    engine, start, examples, _ = case()

    def planted(one: LowRank) -> LowRank:
        return one._replace(**{side: ADAPTERS[bug](getattr(one, side))})

    broken = replace(engine, method=Changed(engine.method, planted))
    result = train_pack(broken, [work_of(start, examples, steps)], {}, ADAMW, private_step(1) if private else None)[0]
    named = "lora_A" if bug == "times zero" else f"lora_{side}"  # zero for B hides A, too
    assert f"{named} never had a gradient in {steps} steps: it is not connected" in result.error


@pytest.mark.parametrize("bug", ["detached", "times zero", "detached, plus zero times itself"])
def test_a_layer_that_nothing_is_read_from(bug: str) -> None:
    """In the model, not in the method: queries are computed and thrown away."""
    engine, start, examples, _ = one_key()
    attention = engine.base.model.model.layers[0].self_attn  # type: ignore[union-attr, index]
    attention.q_proj.register_forward_hook(lambda module, inputs, output: ADAPTERS[bug](output))  # type: ignore[union-attr]
    result = train_pack(engine, [work_of(start, examples)], {}, ADAMW)[0]
    assert "layers.0.self_attn.q_proj.lora_A never had a gradient" in result.error


@pytest.mark.parametrize("bug", ["times zero", "detached, plus zero times itself", "detached"])
def test_a_loss_without_a_gradient(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the task: not to be taken for rows that are all learned."""
    engine, start, examples, _ = saturated_head()
    losses = type(engine.task).row_losses
    monkeypatch.setattr(type(engine.task), "row_losses", lambda *given: ADAPTERS[bug](losses(*given)))
    assert "never had a gradient" in train_pack(engine, [work_of(start, examples)], {}, ADAMW)[0].error


@pytest.mark.parametrize("method", CONFIGS)
def test_the_probe_acquits_a_real_model(method: str) -> None:
    """Float32, MiniLM: gradients of one tensor are a millionth of another's, which must not matter."""
    targets = "query,key,value,attention.output.dense,intermediate.dense,output.dense"
    base = load_base(ModelConfig("minilm"), Classification, 3, targets, dtype=torch.float32, device=torch.device("cpu"))
    built = build_method(CONFIGS[method], base.structure.adapted, base.structure.head)
    engine = Engine.build(base, built, Classification(base.tokenizer.pad_token_id))
    names = set(built.specs())
    found = probe(engine, sorted(names), random_start(engine), ADAMW, None)
    assert found.connected == found.moving == names


def test_a_tensor_that_the_optimizer_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stale for some numbers only."""

    class Half:
        def __init__(self, values: torch.Tensor, *rest: Any) -> None:
            self.kept = values[:, : values.shape[1] // 3]
            self.values, self.whole = values, build_optimizer(values, *rest)

        def step(self, *arguments: Any) -> None:
            before = self.kept.clone()
            self.whole.step(*arguments)
            self.kept.copy_(before)

    engine, start, examples, _ = one_key()
    monkeypatch.setattr(pack_module, "build_optimizer", Half)
    result = train_pack(engine, [work_of(start, examples)], {}, ADAMW)[0]
    assert "layers.0.self_attn.q_proj.lora_A has a gradient but did not move" in result.error


def test_a_step_that_rounding_swallows_for_now() -> None:
    """Float32, SGD: B has hardly left zero, so A's gradient is too small to change a digit of A. It will grow."""
    engine = engine_on(small_model("bert"), "bert", "query,value", torch.float32)
    start = random_start(engine)
    for name in start:
        if name.endswith("lora_B"):
            start[name] = start[name] * 1e-9
    result = train_pack(engine, [work_of(start, random_examples(4, 1), 3)], {}, replace(SGD, learning_rate=1e-3))[0]
    untouched = [n for n, value in result.tensors.items() if np.array_equal(value, start[n].astype(np.float32))]
    assert any(name.endswith("lora_A") for name in untouched), "control: a tensor did not move"
    assert result.error == ""


def test_a_client_that_has_converged() -> None:
    """Its gradients are so small that nothing moves, and that is as it should be."""
    engine = engine_on(small_model("bert"), "bert", "query,value", torch.float32)
    start = {**random_start(engine), "classifier.bias": np.array([17.0, 1.0, 1.0])}
    examples = Examples(random_examples(4, 1).tokens, np.zeros(4, dtype=np.int64))
    result = train_pack(engine, [work_of(start, examples)], {}, replace(SGD, learning_rate=1e-3))[0]
    assert result.loss > 0
    assert np.array_equal(result.tensors["classifier.weight"], start["classifier.weight"].astype(np.float32))
    assert result.error == ""


@pytest.mark.parametrize("rate", [1e-30, 1e-12])
def test_a_rate_that_moves_nothing_of_ordinary_size(rate: float) -> None:
    engine = engine_on(small_model("bert"), "bert", "query,value", torch.float32)
    work = work_of(random_start(engine), random_examples(4, 1))
    assert (
        "train.learning-rate is too small" in train_pack(engine, [work], {}, replace(SGD, learning_rate=rate))[0].error
    )


def product(**zero_and_trained: tuple[bool, bool]) -> tuple[dict[str, TensorSpec], set[str], Sequence[str]]:
    specs = {kind: TensorSpec((2, 2), kind, ("layer",), 1.0) for kind in zero_and_trained}
    zero = {kind for kind, (is_zero, _) in zero_and_trained.items() if is_zero}
    return specs, zero, [kind for kind, (_, trained) in zero_and_trained.items() if trained]


@pytest.mark.parametrize(
    ("factors", "stuck"),
    [
        ({"A": (False, True), "B": (True, True)}, []),  # LoRA's start: B moves first
        ({"A": (False, False), "B": (True, True)}, []),  # FFA-LoRA
        ({"A": (False, True), "B": (True, False)}, ["A"]),  # B fixed at zero
        ({"A": (True, True), "B": (True, True)}, ["A", "B"]),
        ({"A": (False, True), "B": (False, True), "s": (True, True)}, []),
        ({"A": (False, True), "B": (True, True), "s": (True, True)}, ["A", "B", "s"]),
        ({"A": (False, True), "B": (True, True), "B_private": (True, True)}, []),  # two parts of one factor
        ({"A": (False, True), "B": (True, False), "B_private": (False, False)}, []),
    ],
)
def test_zeros_that_hide_a_gradient_for_ever(factors: dict[str, tuple[bool, bool]], stuck: list[str]) -> None:
    specs, zero, trained = product(**factors)
    assert [name for name in trained if is_stuck(name, specs, zero, trained)] == stuck


def test_a_layer_that_earlier_rows_left_at_zero() -> None:
    """RoLoRA: B was trained before and is fixed now. In one layer no row gave it a gradient: that is nobody's fault.

    Frozen by mistake, while other layers' B is trained, it is one.
    """
    engine, start, examples, _ = one_key()
    fixed = {name: value for name, value in start.items() if name.endswith("lora_B")}
    first = next(iter(fixed))
    trained = {name: value for name, value in start.items() if name not in fixed}
    common = {**fixed, first: np.zeros_like(fixed[first])}
    assert train_pack(engine, [work_of(trained, examples)], common, ADAMW)[0].error == ""
    mistaken = {name: value for name, value in start.items() if name != first}
    error = train_pack(engine, [work_of(mistaken, examples)], {first: common[first]}, ADAMW)[0].error
    assert "layers.0.self_attn.q_proj.lora_A never had a gradient" in error
