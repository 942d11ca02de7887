"""DP-SGD in the pack equals a loop over single rows, and Opacus, to 1e-10; what must be noisy is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch.nn import functional

from fedlora.config import TrainConfig
from fedlora.engine import ClientResult, ClientWork, Engine, train_pack
from fedlora.engine.rowwise import Flat
from fedlora.privacy import Mechanism
from fedlora.privacy.step import PrivateStep, clip_factors
from fedlora.transfer import Spans
from tests.support.families import FAMILIES, random_examples
from tests.support.formulas import penalty
from tests.support.matrix import CONFIGS, Arrays, engine_of, proximal_step, random_start, row_loss
from tests.test_packing import METHOD, TARGETS, make_engine, peft_model

TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
ROWS = [[[0, 3, 1], [], [2]], [[], [], []], [[4], [], [1, 5, 0, 2]]]  # ragged; one client empty, one step all empty


class Injected:
    """Noise that a reference can be given, too."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn: list[torch.Tensor] = []

    def normal(self, like: torch.Tensor) -> torch.Tensor:
        self.drawn.append(torch.randn(like.shape, generator=self.generator, dtype=like.dtype))
        return self.drawn[-1].to(like.device)


def private_step(clients: int, noise: float = 0.7, clip: float = 1.0, batch: int = 4) -> PrivateStep:
    mechanism = Mechanism(noise, clip, sample_rate=0.5, expected_batch_size=batch, steps=3)
    return PrivateStep(mechanism, [Injected(k) for k in range(clients)])  # type: ignore[misc]


def ragged(start: Arrays, family: str, rows: Sequence[Sequence[Sequence[int]]] = ROWS) -> list[ClientWork]:
    return [
        ClientWork(
            k,
            random_examples(6, 100 + k, family=family),
            6,
            [np.array(batch, dtype=np.int64) for batch in batches],
            start,
        )
        for k, batches in enumerate(rows)
    ]


def row_gradients(method: str, family: str, engine: Engine, tensors: Arrays, work: ClientWork, rows: Any) -> Arrays:
    """Return each row's gradient by trained tensor, one row at a time from the formula, [rows, ...]."""
    grads: dict[str, list[Any]] = {name: [] for name in work.start}
    fixed = {name: torch.tensor(value) for name, value in work.fixed.items()}
    for row in rows:
        leaves = {name: torch.tensor(tensors[name]).requires_grad_() for name in work.start}
        row_loss(method, family, engine, {**fixed, **leaves}, work, int(row)).backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            grads[name].append(leaf.grad.numpy())
    return {name: np.array(values).reshape(len(rows), *work.start[name].shape) for name, values in grads.items()}


def alone_under_dp(
    method: str,
    family: str,
    engine: Engine,
    work: ClientWork,
    private: PrivateStep,
    noise: Injected,
    train: TrainConfig,
) -> Arrays:
    """The slow reference: one client, one row at a time, DP-SGD as in the paper, plain torch AdamW."""
    mechanism, specs = private.mechanism, engine.method.specs()
    trained = {name: torch.tensor(value).requires_grad_() for name, value in work.start.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=train.learning_rate, weight_decay=train.weight_decay)
    for step, batch in enumerate(work.batches):
        now = {name: value.detach().numpy().copy() for name, value in trained.items()}
        grads = row_gradients(method, family, engine, now, work, batch)
        norms = np.sqrt(sum((value**2).reshape(len(batch), work.start[n].size).sum(1) for n, value in grads.items()))
        factor = np.minimum(1.0, mechanism.max_grad_norm / (norms + 1e-6))
        optimizer.zero_grad()
        extra = penalty(method, trained)
        if extra.requires_grad:
            extra.backward()  # type: ignore[no-untyped-call]
        at = 0
        for name, value in trained.items():
            size = value.numel()
            z = noise.drawn[step][at : at + size].view(value.shape)
            at += size
            total = torch.tensor(np.tensordot(factor, grads[name], 1)) + (
                mechanism.noise_multiplier * mechanism.max_grad_norm * z
            )
            own = total / mechanism.expected_batch_size
            value.grad = own if value.grad is None else value.grad + own
        optimizer.step()
        proximal_step(method, specs, trained, train)
    return {name: value.detach().numpy() for name, value in trained.items()}


def off(one: Arrays, other: Arrays) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def median_norm(method: str, family: str, engine: Engine, start: Arrays) -> float:
    work = ragged(start, family)[0]
    grads = row_gradients(method, family, engine, start, work, range(6))
    return float(np.median(np.sqrt(sum((value.reshape(6, -1) ** 2).sum(1) for value in grads.values()))))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_pack_equals_a_loop_over_rows(method: str, family: str) -> None:
    """Ragged Poisson batches, an empty client, a step that is empty for all, penalties, proximal steps."""
    engine = engine_of(method, family, TARGETS.get(family, "auto"))
    start = random_start(engine)
    private = private_step(3, clip=median_norm(method, family, engine, start))
    pack = ragged(start, family)
    results = train_pack(engine, pack, {}, TRAIN, private)
    for result, work, noise in zip(results, pack, private.randoms, strict=True):
        assert result.error == ""
        expected = alone_under_dp(method, family, engine, work, private, noise, TRAIN)  # type: ignore[arg-type]
        assert off(result.tensors, expected) < 1e-10
        assert off(result.tensors, start) > 1e-3, "control: every client moves, the empty one by noise"
    clipped = [result.diagnostics["clipped_fraction"] for result in results]
    assert 0 < clipped[0] < 1 or 0 < clipped[2] < 1, "rows on both sides of the clip"
    assert [result.diagnostics["empty_steps"] for result in results] == [1, 3, 1]
    assert [result.diagnostics["rows"] for result in results] == [4, 0, 5]


def opacus_alone(work: ClientWork, private: PrivateStep, noise: Injected, engine: Engine, monkeypatch: Any) -> Arrays:
    """Opacus's hooks and DPOptimizer on PEFT's model, one client."""
    adapted, named = peft_model("bert", work.start, METHOD)
    wrapped = GradSampleModule(adapted.train(), loss_reduction="sum")  # hooks sleep in eval(); there is no dropout
    parameters = [named[name] for name in work.start]
    mechanism = private.mechanism
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=mechanism.expected_batch_size,
    )
    for step, batch in enumerate(work.batches):
        queue = list(noise.drawn[step].split([parameter.numel() for parameter in parameters]))

        def injected(std: float, reference: torch.Tensor, queue: Any = queue, **_: Any) -> torch.Tensor:
            return std * queue.pop(0).view(reference.shape)

        monkeypatch.setattr("opacus.optimizers.optimizer._generate_noise", injected)
        optimizer.zero_grad()
        if len(batch):
            inputs = engine.task.collate(work.examples, batch.tolist(), engine.device)
            logits = wrapped(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            functional.cross_entropy(logits, inputs["labels"], reduction="sum").backward()
        else:
            for parameter in parameters:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in named.items()}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's hooks on a frozen embedding
def test_pack_equals_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client by client, with the noise that the pack drew."""
    engine = make_engine("bert")
    start = random_start(engine)
    private = private_step(3, clip=median_norm("lora", "bert", engine, start))
    train = TrainConfig(optimizer="sgd", learning_rate=0.1)
    pack = ragged(start, "bert")
    results = train_pack(engine, pack, {}, train, private)
    for result, work, noise in zip(results, pack, private.randoms, strict=True):
        assert off(result.tensors, opacus_alone(work, private, noise, engine, monkeypatch)) < 1e-10  # type: ignore[arg-type]
    assert 0 < results[2].diagnostics["clipped_fraction"] < 1


def test_splitting_a_batch_changes_nothing() -> None:
    """A logical batch that does not fit goes through the model in parts."""
    engine = engine_of("lora", "bert")
    start = random_start(engine)

    def run(tokens: int) -> list[ClientResult]:
        return train_pack(replace(engine, max_cost=tokens), ragged(start, "bert"), {}, TRAIN, private_step(3))

    whole, parts = run(1024), run(5)
    assert max(off(one.tensors, two.tensors) for one, two in zip(whole, parts, strict=True)) < 1e-10


def test_copies_bound_the_rows_of_a_forward_pass() -> None:
    engine = engine_of("lora", "bert")
    lengths = np.full(50, 4, dtype=np.int64)
    group = np.arange(50)
    assert max(len(part) for part in engine.passes(lengths, group)) == 50
    assert max(len(part) for part in engine.passes(lengths, group, copied=2**24)) == 4
    assert max(len(part) for part in engine.passes(lengths, group, copied=2**40)) == 1


def test_clip_bounds_every_row_and_drops_what_is_not_finite() -> None:
    grads = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads *= torch.tensor([0.01, 0.1, 1.0, 10.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    grads[4, 3], grads[5, 0] = math.nan, math.inf
    rows = Flat(slice(0, 40), grads, Spans.of(np.arange(6), 6, grads.device))
    norms, clipped = rows.squares().sqrt(), torch.zeros_like(grads)
    rows.add(clipped, clip_factors(norms, 1.0))
    assert torch.allclose(clipped[:2], grads[:2]), "below the bound: as it was"
    assert (clipped.norm(dim=1) <= 1.0).all()
    assert clipped[3].norm() > 1 - 1e-5
    assert clipped[4:].abs().max() == 0
    assert torch.isfinite(norms).tolist() == [True] * 4 + [False] * 2


def test_a_row_that_is_not_finite_does_not_show() -> None:
    """A sum that becomes NaN by one row would reveal that the row is there."""
    engine = engine_of("lora", "bert")
    start = random_start(engine)
    poisoned = {**start, "classifier.bias": np.array([np.inf, 0.0, 0.0])}
    result = train_pack(engine, ragged(poisoned, "bert", [[[0, 1, 2]]]), {}, TRAIN, private_step(1))[0]
    assert result.diagnostics["dropped_rows"] == 3
    others = {name: value for name, value in result.tensors.items() if name != "classifier.bias"}
    assert all(np.isfinite(value).all() for value in others.values())


def test_noise_reaches_every_number_and_no_two_clients_share_it() -> None:
    """The noise of an empty batch: all tensors, personal ones and head included, with the deviation that is claimed."""
    from fedlora.privacy import PrivateRandom

    engine = engine_of("mos", "bert")
    start = random_start(engine)
    mechanism = Mechanism(0.7, 2.0, sample_rate=0.5, expected_batch_size=4, steps=1)
    pack = ragged(start, "bert", [[[]], [[]]])
    train = TrainConfig(optimizer="sgd", learning_rate=1.0)
    results = train_pack(engine, pack, {}, train, PrivateStep(mechanism, [PrivateRandom(), PrivateRandom()]))
    flat = []
    for result in results:
        moved = {name: (result.tensors[name] - start[name]).ravel() for name in start}
        assert all((value != 0).all() for value in moved.values())
        flat.append(np.concatenate(list(moved.values())) / (0.7 * 2.0 / 4))
    size = len(flat[0])
    for one in flat:
        assert abs((one**2).sum() - size) < 6 * math.sqrt(2 * size)
        assert abs(one.mean()) < 6 / math.sqrt(size)
    assert abs(float(flat[0] @ flat[1]) / size) < 6 / math.sqrt(size)


@pytest.mark.parametrize("rows", [[[[]]], [[[], [], []]]], ids=["one step", "three steps"])
def test_a_client_without_sampled_rows_is_no_fault(rows: Any) -> None:
    """The watch is about tensors that rows should have moved; without rows it is silent."""
    engine = engine_of("lora", "bert")
    result = train_pack(engine, ragged(random_start(engine), "bert", rows), {}, TRAIN, private_step(1))[0]
    assert result.error == ""


def test_the_watch_sees_through_the_noise() -> None:
    """Noise moves every tensor: an adapter that is not connected still has no gradient of its own."""
    from tests.support.matrix import Changed

    engine = engine_of("lora", "bert")
    detached = Changed(engine.method, lambda factor: factor._replace(A=factor.A.detach(), B=factor.B.detach()))
    planted = replace(engine, method=detached)
    result = train_pack(planted, ragged(random_start(engine), "bert", [[[0, 1], [2]]]), {}, TRAIN, private_step(1))[0]
    assert "never had a gradient" in result.error
