"""FedProx, SCAFFOLD, HetLoRA's penalty and a round's learning rate, in packs of ragged clients, against plain loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.start import VARIATE
from fedlora.config import TrainConfig
from fedlora.engine import ClientResult, ClientWork, Engine, train_pack
from fedlora.engine.local import NO_TERMS
from fedlora.exchange import Instruction, Outcome
from fedlora.local_terms import LocalTerms
from fedlora.methods import initial_tensors
from fedlora.roles import Role
from fedlora.seeded import Seeded
from tests.support.families import random_examples
from tests.support.matrix import Arrays, engine_of, penalty, random_start, row_loss
from tests.support.trainers import tiny_worker
from tests.test_dp_step import Injected, private_step, row_gradients

SHARED = dict.fromkeys(("A", "B", "head"), Role.SHARED)
SGD = TrainConfig(optimizer="sgd", learning_rate=0.1)
LINEAR = TrainConfig(optimizer="sgd", learning_rate=0.1, schedule="linear")
CLIPPED = TrainConfig(optimizer="sgd", learning_rate=0.1, momentum=0.5, clip_norm=0.05)
ADAMW = TrainConfig(learning_rate=0.02, weight_decay=0.1)
BATCHES: list[list[list[int]]] = [[[0, 3, 1], [2], [5, 4]], [], [[4], [1, 5]]]


def random_variate(start: Arrays, seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: 0.1 * generator.standard_normal(value.shape) for name, value in start.items()}


def shared_of(engine: Engine, terms: LocalTerms = NO_TERMS) -> frozenset[str]:
    """All but one side's factors: of a tensor that is not shared no term may take hold; a penalty needs both."""
    return frozenset(name for name, spec in engine.method.specs().items() if spec.kind != "B" or terms.penalty)


def pack_of(engine: Engine, family: str, terms: LocalTerms) -> list[ClientWork]:
    """Three clients of unlike rows and steps; the second takes none, the third lacks a variate, which is zero."""
    start, shared = random_start(engine), shared_of(engine)
    works = []
    for k, batches in enumerate(BATCHES):
        server, own = ({n: v for n, v in random_variate(start, seed).items() if n in shared} for seed in (7, 20 + k))
        if k == 2:
            own.pop(next(iter(own)))
        variates: Any = {"server_variate": server, "own_variate": own} if terms.scaffold else {}
        examples, rows = random_examples(6, 100 + k, family=family), np.arange(6)
        own_batches = [np.array(rows, dtype=np.int64) for rows in batches]
        works.append(ClientWork(k, examples, 6, own_batches, start, rows=rows, **variates))
    return works


def objective(method: str, family: str, engine: Engine, tensors: Mapping[str, Tensor], work: Any, rows: Any) -> Tensor:
    losses = [row_loss(method, family, engine, tensors, work, int(row)) for row in rows]
    return torch.stack(losses).mean() + penalty(method, tensors)


def on_last_ranks(engine: Engine, tensors: Mapping[str, Tensor], terms: LocalTerms) -> Tensor:
    """HetLoRA's penalty as it is written, a term of the loss."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in engine.base.structure.adapted:
        a, b = tensors[f"{layer.name}.lora_A"], tensors[f"{layer.name}.lora_B"]
        first = int(terms.decay * len(a))
        total = total + torch.linalg.norm(b[:, first:]) * torch.linalg.norm(a[first:])
    return terms.penalty * total


def alone(
    method: str, family: str, engine: Engine, work: ClientWork, train: TrainConfig, terms: LocalTerms
) -> tuple[Arrays, Arrays]:
    """One client, one row at a time, torch's optimizers; return its tensors and its renewed variate."""
    shared = shared_of(engine, terms)
    trained = {name: torch.tensor(value).requires_grad_() for name, value in work.start.items()}
    zero = {name: np.zeros_like(value) for name, value in work.start.items()}
    server, own = ({**zero, **variate} for variate in (work.server_variate, work.own_variate))
    rate = train.learning_rate * terms.learning_rate
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained.values(), lr=rate, momentum=train.momentum)
    else:
        optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=train.weight_decay)
    rates = 0.0
    for step, batch in enumerate(work.batches):
        optimizer.zero_grad()
        loss = objective(method, family, engine, trained, work, batch)
        for name in shared:  # FedProx as it is written: a term of the loss
            off = trained[name] - torch.tensor(work.start[name])
            loss = loss + 0.5 * terms.proximal * off.square().sum()
        if terms.penalty:
            loss = loss + on_last_ranks(engine, trained, terms)
        loss.backward()  # type: ignore[no-untyped-call]
        for name in shared:
            assert trained[name].grad is not None
            if terms.scaffold:
                trained[name].grad += torch.tensor(server[name] - own[name])
        if train.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), train.clip_norm)
        now = rate * (1 - step / len(work.batches)) if train.schedule == "linear" else rate
        for group in optimizer.param_groups:
            group["lr"] = now
        rates += now
        optimizer.step()
    ended = {name: value.detach().numpy() for name, value in trained.items()}
    if not work.batches:
        return ended, {name: own[name] for name in shared}
    if terms.scaffold == 1:
        start = {name: torch.tensor(value).requires_grad_() for name, value in work.start.items()}
        objective(method, family, engine, start, work, range(6)).backward()  # type: ignore[no-untyped-call]
        return ended, {name: start[name].grad.numpy() for name in shared}  # type: ignore[union-attr]
    return ended, {name: own[name] - server[name] + (work.start[name] - ended[name]) / rates for name in shared}


def off(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def largest(one: list[ClientResult], other: list[ClientResult]) -> float:
    return max(off(a.tensors, b.tensors) for a, b in zip(one, other, strict=True))


CASES = {
    "rate": (LocalTerms(learning_rate=0.3), LINEAR),
    "prox": (LocalTerms(proximal=0.7), SGD),
    "prox, adamw": (LocalTerms(proximal=0.7, learning_rate=0.5), ADAMW),
    "prox, momentum, clip": (LocalTerms(proximal=0.7), CLIPPED),
    "scaffold 1": (LocalTerms(scaffold=1), SGD),
    "scaffold 1, linear": (LocalTerms(scaffold=1, learning_rate=0.5), LINEAR),
    "scaffold 2": (LocalTerms(scaffold=2), SGD),
    "scaffold 2, linear": (LocalTerms(scaffold=2, learning_rate=0.5), LINEAR),
}


@pytest.mark.parametrize(("method", "family"), [("lora", "bert"), ("lora", "llama-lm"), ("mos", "bert")])
@pytest.mark.parametrize("case", CASES)
def test_a_pack_equals_a_loop(case: str, method: str, family: str) -> None:
    terms, train = CASES[case]
    engine = engine_of(method, family)
    works, shared = pack_of(engine, family, terms), shared_of(engine)
    results = train_pack(engine, works, {}, train, terms=terms, shared=shared)
    for result, work in zip(results, works, strict=True):
        expected, variate = alone(method, family, engine, work, train, terms)
        assert result.error == ""
        assert off(result.tensors, expected) < 1e-10
        if terms.scaffold:
            assert off(result.own_variate, variate) < 1e-10
    plain = train_pack(engine, works, {}, train)
    assert largest(plain, results) > 1e-6, "control: the term makes a difference"
    assert all(result.own_variate == {} for result in plain)


PENALTIES = {
    "all but the first rank": (LocalTerms(penalty=0.7, decay=0.5), SGD),
    "the last rank, adamw": (LocalTerms(penalty=0.7, decay=0.9), ADAMW),
    "with prox, momentum, clip": (LocalTerms(penalty=0.7, proximal=0.3, decay=0.9), CLIPPED),
}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-lm"])
@pytest.mark.parametrize("case", PENALTIES)
def test_hetloras_penalty_is_a_term_of_the_loss(case: str, family: str) -> None:
    terms, train = PENALTIES[case]
    engine = engine_of("lora", family)
    works, shared = pack_of(engine, family, terms), shared_of(engine, terms)
    results = train_pack(engine, works, {}, train, terms=terms, shared=shared)
    for result, work in zip(results, works, strict=True):
        assert result.error == ""
        assert off(result.tensors, alone("lora", family, engine, work, train, terms)[0]) < 1e-10
    without = train_pack(engine, works, {}, train, terms=replace(terms, penalty=0.0), shared=shared)
    assert largest(without, results) > 1e-4, "control: the term makes a difference"


def test_hetloras_penalty_has_no_gradient_where_b_is_zero() -> None:
    """As in the first step of a run: no number is divided by a norm of zero, and the step is that of the loss alone."""
    engine, terms = engine_of("lora", "bert"), LocalTerms(penalty=0.7, decay=0.5)
    start = initial_tensors(engine.method.specs(), Seeded(7))
    work = ClientWork(0, random_examples(6, 1), 6, [np.arange(6)], start)
    results = [
        train_pack(engine, [work], {}, SGD, terms=one, shared=shared_of(engine, terms))[0]
        for one in (terms, LocalTerms())
    ]
    assert off(results[0].tensors, results[1].tensors) == 0.0
    assert off(results[0].tensors, start) > 1e-4


def test_option_1_on_the_whole_objective() -> None:
    """With a method's own penalty: it is part of each step's gradient, so of the variate, too."""
    engine, terms = engine_of("s2-lora", "bert"), LocalTerms(scaffold=1)
    works = pack_of(engine, "bert", terms)
    result = train_pack(engine, works, {}, SGD, terms=terms, shared=shared_of(engine))[0]
    _, variate = alone("s2-lora", "bert", engine, works[0], SGD, terms)
    assert off(result.own_variate, variate) < 1e-10


@pytest.mark.parametrize("train", [SGD, LINEAR, CLIPPED, ADAMW])
def test_without_terms_nothing_changes(train: TrainConfig) -> None:
    """To the bit, whatever is shared, and whatever variates lie about."""
    engine = engine_of("lora", "bert")
    works = pack_of(engine, "bert", LocalTerms(scaffold=1))
    plain = train_pack(engine, [replace(work, server_variate={}, own_variate={}) for work in works], {}, train)
    same = train_pack(engine, works, {}, train, terms=LocalTerms(), shared=shared_of(engine))
    assert all(
        np.array_equal(a.tensors[name], b.tensors[name]) for a, b in zip(plain, same, strict=True) for name in a.tensors
    )


@pytest.mark.parametrize(
    "terms",
    [LocalTerms(proximal=0.7), LocalTerms(scaffold=2), LocalTerms(penalty=0.7, decay=0.5)],
    ids=["prox", "scaffold", "penalty"],
)
def test_under_dp_terms_come_after_clip_and_noise(terms: LocalTerms) -> None:
    engine = engine_of("lora", "bert")
    works, shared, private = pack_of(engine, "bert", terms), shared_of(engine, terms), private_step(3, clip=0.05)
    results = train_pack(engine, works, {}, SGD, private, terms=terms, shared=shared)
    for result, work, noise in zip(results, works, private.randoms, strict=True):
        tensors, variate = alone_under_dp(engine, work, private, noise, terms)  # type: ignore[arg-type]
        assert off(result.tensors, tensors) < 1e-10
        if terms.scaffold:
            assert off(result.own_variate, variate) < 1e-10
    plain = train_pack(engine, works, {}, SGD, private_step(3, clip=0.05))
    assert largest(plain, results) > 1e-6, "control: the term makes a difference"


def alone_under_dp(
    engine: Engine, work: ClientWork, private: Any, noise: Injected, terms: LocalTerms
) -> tuple[Arrays, Arrays]:
    """DP-SGD of one client, one row at a time, in numpy."""
    mechanism, shared, rate = private.mechanism, shared_of(engine, terms), SGD.learning_rate
    now = {name: value.copy() for name, value in work.start.items()}
    zero = {name: np.zeros_like(value) for name, value in work.start.items()}
    server, own = ({**zero, **variate} for variate in (work.server_variate, work.own_variate))
    for step, batch in enumerate(work.batches):
        grads = row_gradients("lora", "bert", engine, now, work, batch)
        norms = np.sqrt(sum((value**2).reshape(len(batch), -1).sum(1) for value in grads.values()))
        factor, at = np.minimum(1.0, mechanism.max_grad_norm / (norms + 1e-6)), 0
        moved, penalised = {}, {name: torch.tensor(value).requires_grad_() for name, value in now.items()}
        if terms.penalty:
            on_last_ranks(engine, penalised, terms).backward()  # type: ignore[no-untyped-call]
        for name, value in now.items():
            z = noise.drawn[step][at : at + value.size].view(value.shape).numpy()
            at += value.size
            total = np.tensordot(factor, grads[name], 1)
            total = total + mechanism.noise_multiplier * mechanism.max_grad_norm * z
            grad = total / mechanism.expected_batch_size
            if name in shared:
                grad = grad + terms.proximal * (value - work.start[name])
                grad = grad + (server[name] - own[name] if terms.scaffold else 0.0)
            own_penalty = penalised[name].grad
            grad = grad if own_penalty is None else grad + own_penalty.numpy()
            moved[name] = value - rate * grad
        now = moved
    rates = rate * len(work.batches)
    if not rates:
        return now, {name: own[name] for name in shared}
    return now, {name: own[name] - server[name] + (work.start[name] - now[name]) / rates for name in shared}


def test_variates_take_the_drift_out() -> None:
    """With c_k its own gradient at the server's model, and c zero, a client's first step stands still."""
    engine, terms = engine_of("lora", "bert"), LocalTerms(scaffold=1)
    start, shared = random_start(engine), frozenset(engine.method.specs())
    rows = np.arange(6)
    work = ClientWork(0, random_examples(6, 1), 6, [rows], start, rows=rows)
    first = train_pack(engine, [work], {}, SGD, terms=terms, shared=shared)[0]
    assert off(first.tensors, start) > 1e-3
    settled = replace(work, own_variate=first.own_variate)
    again = train_pack(engine, [settled], {}, SGD, terms=terms, shared=shared)[0]
    assert off(again.tensors, start) < 1e-12
    assert again.error == "", "a client that stands still because its gradient is taken out is sound"


def test_option_1_takes_all_rows_of_a_client(tmp_path: Path) -> None:
    """At a client: after one step on all of its rows both options are the same number."""
    keys = {"train.optimizer": "sgd", "train.local-steps": 1, "train.batch-size": 4, "train.schedule": "constant"}
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", **keys})
    sent = dict(worker.loaded.model.initial)
    zero = {f"{VARIATE}{name}": np.zeros_like(value) for name, value in sent.items()}

    def changes(option: int, number: int, batch_size: int) -> Arrays:
        flat = {"strategy.name": "fedavg", **keys, "train.batch-size": batch_size}
        one = tiny_worker(tmp_path / f"{number}", **flat)
        instruction = Instruction(1, (0,), SHARED, sent, local=LocalTerms(scaffold=option), extra=zero)
        (update,) = one.train(instruction)
        assert update.report.outcome is Outcome.OK, update.report.reason
        return dict(update.extra)

    every = len(worker.loaded.trainer.data.training_rows(0))
    assert off(changes(1, 1, 4), changes(2, 2, every)) < 1e-10
    assert off(changes(2, 3, 4), changes(2, 2, every)) > 1e-4, "control: four rows are not all of them"
