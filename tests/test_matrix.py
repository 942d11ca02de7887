"""What every method and strategy must hold, on every model family and task: see matrix.py for how one joins.

What needs no model is in test_matrix_server.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora.config import TrainConfig
from fedlora.engine import Engine, train_pack
from fedlora.engine.layers import Layout
from fedlora.exchange import ClientReport, Update
from fedlora.methods import ScaledBases, TensorSpec, WeightDecomposed, as_low_rank, initial_tensors
from fedlora.reduce import REDUCTIONS
from fedlora.runs.export import adapter_files
from fedlora.seeded import Seeded
from strategies import STRATEGIES
from tests.support.families import random_examples, small_model, without_float32
from tests.support.federation import updates
from tests.support.formulas import FORMULAS, LAYERS
from tests.support.matrix import (
    CASES,
    CONFIGS,
    LINEAR,
    MODELS,
    Arrays,
    alone,
    cycle,
    engine_of,
    method_of,
    random_start,
    row_loss,
    setting,
    trained_kinds,
    works,
)

TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
cases = pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])
methods = pytest.mark.parametrize("method", CONFIGS)
models = pytest.mark.parametrize("family", MODELS)


def split(start: Arrays, specs: dict[str, TensorSpec], kinds: set[str]) -> tuple[Arrays, Arrays]:
    """Return what is trained, and what is common to all clients."""
    trained = {name: value for name, value in start.items() if specs[name].kind in kinds}
    return trained, {name: value for name, value in start.items() if name not in trained}


# -- with a model -------------------------------------------------------------------------------------


def _packings() -> Iterator[tuple[str, frozenset[str]]]:
    """Each method with each set of kinds that some strategy trains in some round."""
    found = set()
    for name, method in CASES:
        strategy = STRATEGIES[name](setting(method))
        found |= {(method, frozenset(trained_kinds(strategy, number))) for number in cycle(strategy)}
    yield from sorted(found, key=lambda one: (one[0], sorted(one[1])))


PACKINGS = list(_packings())


@models
@pytest.mark.parametrize(("method", "kinds"), PACKINGS, ids=[f"{m}-{'+'.join(sorted(k))}" for m, k in PACKINGS])
def test_packed_equals_sequential(method: str, kinds: frozenset[str], family: str) -> None:
    """Ragged clients in one pack against one client, one row at a time, from the formula."""
    engine = engine_of(method, family)
    trained, common = split(random_start(engine), engine.method.specs(), set(kinds))
    pack = works(trained, family)
    for result, work in zip(train_pack(engine, pack, common, TRAIN), pack, strict=True):
        assert result.error == ""
        expected = alone(method, family, engine, work, common, TRAIN)
        assert result.tensors.keys() == expected.keys()
        off = max(float(np.abs(result.tensors[n] - expected[n]).max()) for n in expected)
        assert off < 1e-10
    moved = max(float(np.abs(result.tensors[n] - trained[n]).max()) for n in trained)
    assert moved > 1e-3, "control: training moves tensors by far more"


@models
@methods
def test_gradients_of_each_row(method: str, family: str) -> None:
    """One row to a group gives each row's own gradient of every tensor, as a loop over rows does."""
    engine = engine_of(method, family)
    start = random_start(engine)
    work = works(start, family)[0]
    rows = range(6)
    stacked = {name: torch.tensor(value).expand(6, *value.shape).clone() for name, value in start.items()}
    for value in stacked.values():
        value.requires_grad_()
    batch = engine.task.collate(work.examples, rows, engine.device)
    with engine.grouped.placed(
        engine.method.factors(stacked), Layout.of(np.arange(6), 6, torch.device("cpu"))
    ) as model:
        engine.task.row_losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    largest = dict.fromkeys(stacked, 0.0)
    for row in rows:
        single = {name: torch.tensor(value).requires_grad_() for name, value in start.items()}
        row_loss(method, family, engine, single, work, row).backward()  # type: ignore[no-untyped-call]
        for name, value in stacked.items():
            assert value.grad is not None
            grad = single[name].grad
            assert grad is not None
            assert float((value.grad[row] - grad).abs().max()) < 1e-10, name
            largest[name] = max(largest[name], float(grad.abs().max()))
    assert min(largest.values()) > 1e-6, "a single row may give a tensor no gradient, all rows together do"


@pytest.mark.parametrize("method", LINEAR)
def test_gradcheck(method: str) -> None:
    """Two groups at once: derivatives of all layers' updates by finite differences."""
    torch.manual_seed(0)
    specs = {n: s for n, s in method_of(method).specs().items() if s.kind != "head"}
    tensors = [torch.randn(2, *spec.shape, dtype=torch.float64, requires_grad=True) for spec in specs.values()]
    head = {n: torch.zeros(s.shape) for n, s in method_of(method).specs().items() if s.kind == "head"}

    def function(*values: torch.Tensor) -> torch.Tensor:
        named = {**head, **dict(zip(specs, values, strict=True))}
        factors = list(method_of(method).factors(named).values())
        sums = [f for f in factors if isinstance(f, ScaledBases)]
        lows = [as_low_rank(f) for f in factors if not isinstance(f, ScaledBases)]
        parts = [(low.scaled_b() @ low.A).flatten() for low in lows if low is not None]
        parts += [f.of(torch.eye(len(f.B if f.transposed else f.A.mT)).double()).flatten() for f in sums]
        parts += [f.magnitude.flatten() for f in factors if isinstance(f, WeightDecomposed)]
        extra = method_of(method).penalty(named)
        return torch.cat([*parts, *([] if extra is None else [extra])])

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@models
@pytest.mark.parametrize("method", LINEAR)
def test_peft_reproduces_the_logits(method: str, family: str, targets: str, tmp_path: Path) -> None:
    """float64 to 1e-12 and float32 to 1e-4 of the largest logit; layers and ranks of no use are left out."""
    if method == "mos" and family == "bert" and targets == "all-linear":
        # A layer that comes once, the pooler, has too few shards for itself: refused, see test_mos.py.
        targets = "query,key,value,attention.output.dense,intermediate.dense,output.dense"
    engine = engine_of(method, family, targets)
    tensors = random_start(engine)
    if method == "s2-lora":
        name = next(name for name in tensors if name.endswith(".s"))
        tensors[name][0] = 0.0  # a layer without any rank
        tensors[name][1, 0] = 0.0  # and one with fewer than the others
    for file, content in adapter_files(engine, tensors, CONFIGS[method]).items():
        (tmp_path / file).write_bytes(content)
    batch = engine.task.collate(random_examples(6, seed=2, family=family), range(6), torch.device("cpu"))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    factors = engine.method.factors({name: engine.tensor(value) for name, value in tensors.items()})
    with torch.no_grad(), engine.grouped.placed(factors, Layout(1, 6, None)) as model:
        expected = model(**inputs).logits
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        plain = without_float32(small_model(family)).to(dtype)
        with torch.no_grad():
            before = plain(**inputs).logits
            loaded = PeftModel.from_pretrained(plain, str(tmp_path)).to(dtype).eval()
            logits = loaded(**inputs).logits
        assert float((logits - expected).abs().max()) < bound * float(expected.abs().max())
        assert float((before - expected).abs().max()) > 1e-2, "control: the adapter makes a difference"


@models
@cases
def test_everything_that_should_train_does_from_the_start(name: str, method: str, family: str) -> None:
    """The model starts as its base, or near it; over a cycle of rounds each trained tensor moves, none is refused."""
    engine = engine_of(method, family)
    specs = engine.method.specs()
    strategy = STRATEGIES[name](setting(method, specs=specs))
    seeded = initial_tensors(specs, Seeded(0))
    most = FORMULAS[method].start
    assert all(np.abs(update).max() <= most for update in updates(method, seeded, engine.method).values())
    state, personal, moved = strategy.initial(seeded), {}, set()
    for number in cycle(strategy):
        trained, common = split({**seeded, **personal, **state.tensors}, specs, trained_kinds(strategy, number))
        result = train_pack(engine, works(trained, family), common, TRAIN)[0]
        assert result.error == ""
        moved |= {specs[key].kind for key, value in result.tensors.items() if not np.array_equal(value, trained[key])}
        expected = strategy.expected(number)
        personal |= {key: value for key, value in result.tensors.items() if key not in expected}
        reduction = REDUCTIONS[strategy.reduction(number)]()
        reduction.add(Update(ClientReport(0), {key: result.tensors[key] for key in expected}), 1)
        state = strategy.apply(state, reduction.reduced(), number)
    assert moved >= strategy.trained_kinds
    ended = updates(method, {**seeded, **personal, **state.tensors}, engine.method)
    assert all(np.any(update) for update in ended.values())


def test_layers_of_the_matrix_are_not_square() -> None:
    """A transposed factor must not pass for want of a layer that shows it."""
    assert all(layer.d_in != layer.d_out for layer in LAYERS)
    assert isinstance(engine_of("lora", "gpt2"), Engine)
