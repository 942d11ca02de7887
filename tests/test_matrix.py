"""What every method and strategy must hold, on every model family and task: see matrix.py for how one joins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel

from fedlora.config import TrainConfig
from fedlora.delta_w import updates
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.engine.layers import Layout
from fedlora.methods import LowRank, TensorSpec, initial_tensors
from fedlora.roles import Role
from fedlora.runs.export import adapter_files
from fedlora.seeded import Seeded
from fedlora.wire import Instruction, from_named_arrays, named_arrays
from strategies import STRATEGIES, RoleStrategy
from tests.support.families import random_examples, small_model, without_float32
from tests.support.loop import LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import (
    BYTES,
    CASES,
    CONFIGS,
    LAYERS,
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
)

TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
cases = pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])
methods = pytest.mark.parametrize("method", CONFIGS)
models = pytest.mark.parametrize("family", MODELS)


def works(start: Arrays, family: str) -> list[ClientWork]:
    """Three ragged clients; the second has no rows."""
    batches: list[list[list[int]]] = [[[0, 3, 1], [2]], [], [[4], [1, 5]]]
    return [
        ClientWork(k, random_examples(6, 100 + k, family=family), 6, [np.array(rows) for rows in own], start)
        for k, own in enumerate(batches)
    ]


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
    with engine.grouped.placed(engine.method.factors(stacked), Layout.of(torch.arange(6), 6)) as model:
        engine.task.row_losses(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    for row in rows:
        single = {name: torch.tensor(value).requires_grad_() for name, value in start.items()}
        row_loss(method, family, engine, single, work, row).backward()  # type: ignore[no-untyped-call]
        for name, value in stacked.items():
            assert value.grad is not None
            grad = single[name].grad
            assert grad is not None
            assert float((value.grad[row] - grad).abs().max()) < 1e-10, name
            assert float(grad.abs().max()) > 0, name


@methods
def test_gradcheck(method: str) -> None:
    """Two groups at once: derivatives of all layers' updates by finite differences."""
    torch.manual_seed(0)
    specs = {n: s for n, s in method_of(method).specs().items() if s.kind != "head"}
    tensors = [torch.randn(2, *spec.shape, dtype=torch.float64, requires_grad=True) for spec in specs.values()]
    head = {n: torch.zeros(s.shape) for n, s in method_of(method).specs().items() if s.kind == "head"}

    def function(*values: torch.Tensor) -> torch.Tensor:
        named = {**head, **dict(zip(specs, values, strict=True))}
        factors = method_of(method).factors(named).values()
        parts = [(f.scaled_b() @ f.A).flatten() for f in factors if isinstance(f, LowRank)]
        extra = method_of(method).penalty(named)
        return torch.cat([*parts, *([] if extra is None else [extra])])

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@models
@methods
def test_peft_reproduces_the_logits(method: str, family: str, targets: str, tmp_path: Path) -> None:
    """float64 to 1e-12 and float32 to 1e-5 of the largest logit; layers and ranks of no use are left out."""
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
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
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
    """The model starts as its base; over one cycle of rounds each trained tensor moves and no client is refused."""
    engine = engine_of(method, family)
    specs = engine.method.specs()
    strategy = STRATEGIES[name](replace(setting(method), specs=specs))
    seeded = initial_tensors(specs, Seeded(0))
    assert all(np.all(update == 0) for update in updates(engine.method, seeded).values())
    server = {key: np.asarray(value) for key, value in strategy.initial(seeded).items()}
    private: Arrays = {}
    for number in cycle(strategy):
        held = {**seeded, **private, **server}
        trained, common = split(held, specs, trained_kinds(strategy, number))
        result = train_pack(engine, works(trained, family), common, TRAIN)[0]
        assert result.error == ""
        shared = strategy.exchanged(number, Role.SHARED)
        private |= {key: value for key, value in result.tensors.items() if key not in shared}
        mean = {key: value for key, value in result.tensors.items() if key in shared}
        server = {key: np.asarray(value) for key, value in strategy.combine(server, mean, number).items()}
    ended = {**seeded, **private, **server}
    moved = {specs[key].kind for key in ended if not np.array_equal(ended[key], seeded[key])}
    assert moved >= strategy.trained_kinds
    assert all(np.any(update) for update in updates(engine.method, ended).values())


# -- the server alone ---------------------------------------------------------------------------------


def seeded_of(method: str, dtype: str = "float64") -> Arrays:
    return dict(initial_tensors(method_of(method).specs(), Seeded(0), dtype))


def run(strategy: RoleStrategy, method: str, grid: LoopGrid, rounds: int, start: Arrays | None = None) -> Arrays:
    tensors = strategy.initial(seeded_of(method, strategy.setting.dtype)) if start is None else start
    result = strategy.start(grid, named_arrays(tensors), num_rounds=rounds, timeout=1.0)
    assert result.arrays is not None
    return from_named_arrays(result.arrays)


def random_state(strategy: RoleStrategy, number: int) -> Arrays:
    """What a server might hold after some rounds."""
    return update_of(99, 7, strategy.exchanged(number))


@pytest.mark.parametrize("weights", ["examples", "equal"])
@cases
def test_mean_of_updates(name: str, method: str, weights: str) -> None:
    """Whether the server's Delta W is the weighted mean of the clients' is what the strategy says it is."""
    off = 0.0
    for number in cycle(STRATEGIES[name](setting(method))):
        strategy = STRATEGIES[name](setting(method, weights=weights))
        held = {**seeded_of(method), **random_state(strategy, number)}
        grid = LoopGrid({1: node_of(strategy), 2: node_of(strategy)})
        replies = []
        for message in strategy.configure_train(number, named_arrays(random_state(strategy, number)), Any, grid):  # type: ignore[arg-type]
            names = grid.push_messages([message])
            replies += list(grid.pull_messages(names))
        arrays, _ = strategy.aggregate_train(number, replies)
        assert arrays is not None
        server = from_named_arrays(arrays)
        if strategy.exact is None:
            assert not set(method_of(method).specs()) <= {*server, "head.weight", "head.bias"}
            return
        shares = np.array([examples_of(k) if weights == "examples" else 1 for k in range(5)], dtype=float)
        shares /= shares.sum()
        shared = strategy.exchanged(number, Role.SHARED)
        clients = [updates(method_of(method), {**held, **update_of(k, number, shared)}) for k in range(5)]
        for layer, update in updates(method_of(method), {**held, **server}).items():
            mean = sum(share * client[layer] for share, client in zip(shares, clients, strict=True))
            off = max(off, float(np.linalg.norm(update - mean) / np.linalg.norm(mean)))
    if STRATEGIES[name].exact:
        assert off < 1e-13
    else:
        assert off > 0.1, "averaging factors apart is a real error, not rounding"


@cases
def test_same_bits_in_any_order_of_clients_and_replies(name: str, method: str) -> None:
    results = []
    for nodes in ({1: 0}, {1: 0, 2: 0, 3: 0}, dict.fromkeys(range(10, 15), 0)):
        for order in (list, lambda replies: replies[::-1]):
            strategy = STRATEGIES[name](setting(method, dtype="float32", learning_rate=0.1))
            results.append(run(strategy, method, LoopGrid(dict.fromkeys(nodes, node_of(strategy)), order), 3))
    assert all(np.array_equal(results[0][key], other[key]) for other in results for key in other)
    assert all(value.dtype == np.float32 for value in results[0].values())


@cases
def test_weights_count(name: str, method: str) -> None:
    """Examples as weights give another mean than equal ones, whatever is exchanged."""
    one, two = (STRATEGIES[name](setting(method, weights=weights)) for weights in ("examples", "equal"))
    for strategy in (one, two):
        strategy.arrays = run(strategy, method, LoopGrid({1: node_of(strategy)}), 1)  # type: ignore[attr-defined]
    shared = one.exchanged(1, Role.SHARED)
    assert all(np.abs(one.arrays[key] - two.arrays[key]).max() > 1e-3 for key in shared)  # type: ignore[attr-defined]


@cases
def test_identical_clients_leave_the_model_as_it_is(name: str, method: str) -> None:
    """Clients that send what they were sent: Delta W stays; a proximal step shrinks it by its threshold, no more."""
    for number in cycle(STRATEGIES[name](setting(method))):
        for rate in (0.0, 0.5):
            strategy = STRATEGIES[name](setting(method, learning_rate=rate))
            state = random_state(strategy, number)
            grid = LoopGrid({1: node_of(strategy, same={**seeded_of(method), **state})})
            messages = strategy.configure_train(number, named_arrays(state), Any, grid)  # type: ignore[arg-type]
            arrays, _ = strategy.aggregate_train(number, list(grid.pull_messages(grid.push_messages(messages))))
            assert arrays is not None
            expected = {**seeded_of(method), **state}
            for key, spec in strategy.exchanged(number, Role.SHARED).items():
                if spec.l1:
                    shrunk = np.abs(expected[key]) - rate * spec.l1
                    expected[key] = np.sign(expected[key]) * np.maximum(shrunk, 0)
            after = updates(method_of(method), {**seeded_of(method), **state, **from_named_arrays(arrays)})
            for layer, update in updates(method_of(method), expected).items():
                assert np.abs(after[layer] - update).max() < 1e-12


@cases
def test_a_resumed_server_goes_on_to_the_same_bits(name: str, method: str) -> None:
    """Three rounds, a new server with what a checkpoint holds, two more: tensors and bytes as without the break."""

    def fresh() -> RoleStrategy:
        return STRATEGIES[name](setting(method, clients_per_round=3, learning_rate=0.1))

    def go(strategy: RoleStrategy, start: Arrays, rounds: int, completed: int = 0) -> tuple[Arrays, list[Any]]:
        result = strategy.start(
            LoopGrid({1: node_of(strategy), 2: node_of(strategy)}),
            named_arrays(start),
            num_rounds=rounds,
            completed=completed,
        )
        assert result.arrays is not None
        return from_named_arrays(result.arrays), [dict(m) for m in result.train_metrics_clientapp.values()]

    whole = fresh()
    expected, lines = go(whole, dict(whole.initial(seeded_of(method))), 5)
    first = fresh()
    half, _ = go(first, dict(first.initial(seeded_of(method))), 3)
    second = fresh()
    second.have_trained, second.knows = first.have_trained, first.knows
    ended, rest = go(second, half, 5, completed=3)
    assert rest == lines[3:]
    assert ended.keys() == expected.keys()
    assert all(np.array_equal(ended[key], expected[key]) for key in expected)


@cases
def test_bytes_are_theory(name: str, method: str) -> None:
    """Over the second cycle of rounds, all clients taking part: elements times eight, up, down, and down if kept."""
    strategy = STRATEGIES[name](setting(method, head=Role.FROZEN))
    tallies = []

    def note(number: int, _arrays: Any, _result: Any) -> None:
        if number:
            assert strategy.tally is not None
            tallies.append(strategy.tally)

    strategy.start(
        LoopGrid({1: node_of(strategy)}),
        named_arrays(strategy.initial(seeded_of(method))),
        num_rounds=2 * strategy.period,
        on_round=note,
    )
    later = tallies[strategy.period :]
    up, down, cached = BYTES[name, method]
    clients, personal = 5, 2 if strategy.has_personal else 1  # to evaluate they are sent the tensors once more
    assert sum(tally.bytes_up for tally in later) / len(later) == pytest.approx(8 * clients * up)
    assert sum(tally.bytes_down for tally in later) / len(later) == pytest.approx(8 * clients * down * personal)
    assert sum(tally.bytes_down_cached for tally in later) / len(later) == pytest.approx(8 * clients * cached)


@cases
def test_what_a_client_lacks_is_all_that_changed_since(name: str, method: str) -> None:
    """However long ago it took part: a look at one cycle of rounds tells the same as a look at all of them."""
    strategy = STRATEGIES[name](setting(method))
    for number in range(1, 9):
        for known in range(-1, number):
            changed = set().union(*(strategy.changed(between) for between in range(known + 1, number)))
            lacking = {spec.kind for spec in strategy.lacking(number, known).values()}
            assert lacking == changed & {spec.kind for spec in strategy.exchanged(number).values()}


def spoiled(kind: str, value: NDArray[Any]) -> NDArray[Any]:
    match kind:
        case "nan":
            return np.where(np.arange(value.size).reshape(value.shape) == 0, np.nan, value)
        case "shape":
            return value[:-1]
        case "dtype":
            return value.astype(np.float32)
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["nan", "shape", "dtype"])
@cases
def test_garbage_is_refused_whatever_tensor_holds_it(name: str, method: str, kind: str) -> None:
    for tensor in STRATEGIES[name](setting(method)).exchanged(1, Role.SHARED):
        strategy = STRATEGIES[name](setting(method))

        def spoil(client: int, update: Arrays, tensor: str = tensor) -> Arrays:
            return {**update, tensor: spoiled(kind, update[tensor])} if client == 2 else update

        run(strategy, method, LoopGrid({k: node_of(strategy, spoil) for k in range(1, 6)}), 1)
        assert strategy.tally is not None
        assert list(strategy.tally.refused) == [2]
        assert tensor in strategy.tally.refused[2]


@cases
def test_private_and_frozen_tensors_never_cross_the_wire(name: str, method: str) -> None:
    """Not in any message, down or up, of training or evaluation; and one that comes all the same is refused."""
    strategy = STRATEGIES[name](setting(method, 2))
    grid = LoopGrid({1: node_of(strategy)})
    run(strategy, method, grid, 2 * strategy.period)
    specs = method_of(method).specs()
    for message in grid.sent:
        instruction = Instruction.from_content(message.content)
        kept = {kind for kind, role in instruction.roles.items() if role in (Role.PERSONAL, Role.FROZEN)}
        assert not {specs[key].kind for key in instruction.tensors} & kept
    kept = {kind for kind, role in strategy.all_roles(1).items() if role in (Role.PERSONAL, Role.FROZEN)}
    extra = next((key for key, spec in specs.items() if spec.kind in kept), None)
    if extra is None:
        assert strategy.exchanged(1).keys() == specs.keys()
        return
    leaking = STRATEGIES[name](setting(method, 2))

    def leak(client: int, update: Arrays) -> Arrays:
        return {**update, extra: np.zeros(specs[extra].shape)} if client == 0 else update

    run(leaking, method, LoopGrid({1: node_of(leaking, leak), 2: node_of(leaking)}), 1)
    assert leaking.tally is not None
    assert f"{extra} is not expected" in leaking.tally.refused[0]
    assert 1 not in leaking.tally.refused


def test_layers_of_the_matrix_are_not_square() -> None:
    """A transposed factor must not pass for want of a layer that shows it."""
    assert all(layer.d_in != layer.d_out for layer in LAYERS)
    assert isinstance(engine_of("lora", "gpt2"), Engine)
