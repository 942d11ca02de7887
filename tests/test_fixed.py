"""Tensors that clients of a pack do not train, and have otherwise than each other: as if each client trained alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine import ClientResult, ClientWork, Engine, train_pack
from fedlora.engine.pack import Pack
from fedlora.local_terms import LocalTerms
from fedlora.methods import Factor, Method, TensorSpec
from fedlora.methods.residual import residual_specs
from tests.support.matrix import MODELS, Arrays, alone, engine_of, random_start
from tests.test_dp_step import alone_under_dp, off, private_step, ragged, row_gradients
from tests.test_unpadded import tried

TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
SGD = TrainConfig(optimizer="sgd", learning_rate=0.1)
ROWS = [[[0, 3, 1], [2], [4, 0]], [[5, 1]], [[4], [1, 5, 0, 2]]]  # ragged, and of unlike numbers of steps
RANKS = (1, 3, 2)
families = pytest.mark.parametrize("family", MODELS)


def factor_of(kind: str, engine: Engine) -> list[str]:
    return [name for name, spec in engine.method.specs().items() if spec.kind == kind]


def works_of(engine: Engine, family: str, case: str, rows: Sequence[Any] = ROWS) -> list[ClientWork]:
    """Three clients with fixed tensors of their own: another A, a residual, or one whose rank differs, 0 among them."""
    whole, works = random_start(engine), []
    for k, work in enumerate(ragged(whole, family, rows)):
        generator = np.random.default_rng([5, k])
        start, fixed = dict(work.start), dict[str, Any]()
        if case == "A":
            fixed = {name: generator.uniform(-0.5, 0.5, start.pop(name).shape) for name in factor_of("A", engine)}
        elif case == "residual":
            specs = residual_specs(engine.method.specs(), [4] * len(engine.base.structure.adapted))
            fixed = {name: 0.2 * generator.standard_normal(spec.shape) for name, spec in specs.items()}
        else:  # the other ranks of one LoRA
            rank = RANKS[k]
            for kind, axis, part in (("A", 0, "residual_A"), ("B", 1, "residual_B")):
                for name in factor_of(kind, engine):
                    own = start[name] + 0.1 * generator.standard_normal(start[name].shape)
                    start[name], other = np.split(own, [rank], axis)
                    fixed[f"{name.rpartition('.')[0]}.{part}"] = other
        works.append(replace(work, start=start, fixed=fixed))
    return works


cases = pytest.mark.parametrize("case", ["A", "residual", "ranks"])


def largest(results: Sequence[ClientResult], expected: Sequence[Arrays]) -> float:
    return max(off(result.tensors, one) for result, one in zip(results, expected, strict=True))


@cases
@families
def test_a_pack_equals_one_client_and_one_row_at_a_time(family: str, case: str) -> None:
    """By the formula of each layer's update; in one pass a step, in many, and on tokens without padding."""
    engine = engine_of("lora", family)
    works = works_of(engine, family, case)
    expected = [alone("lora", family, engine, work, work.fixed, TRAIN) for work in works]
    for some in (engine, replace(engine, max_cost=13), tried(engine_of("lora", family))):
        results = train_pack(some, works, {}, TRAIN)
        assert [result.error for result in results] == [""] * 3
        assert largest(results, expected) < 1e-10
    # Planted: another client's fixed tensors.
    turned = [replace(work, fixed=works[(k + 1) % 3].fixed) for k, work in enumerate(works)]
    assert all(
        off(result.tensors, one) > 1e-4
        for result, one in zip(train_pack(engine, turned, {}, TRAIN), expected, strict=True)
    )
    assert all(off(one, dict(work.start)) > 1e-3 for one, work in zip(expected, works, strict=True)), (
        "control: it moves"
    )


@cases
@families
def test_rows_under_dp_equal_a_loop(family: str, case: str) -> None:
    """Each row with its client's fixed tensors, which are neither clipped nor noised; an empty batch among them."""
    engine = engine_of("lora", family)
    works = works_of(engine, family, case, [[[0, 3, 1], [], [2]], [[5, 1]], [[4], [1, 5, 0, 2]]])
    first = row_gradients("lora", family, engine, dict(works[0].start), works[0], works[0].batches[0])
    clip = float(np.median(np.sqrt(sum((value.reshape(3, -1) ** 2).sum(1) for value in first.values()))))
    private = private_step(3, noise=0.01, clip=clip)
    results = train_pack(replace(engine, max_cost=40), works, {}, TRAIN, private)
    unpadded = private_step(3, noise=0.01, clip=clip)
    sides = train_pack(tried(engine_of("lora", family)), works, {}, TRAIN, unpadded)
    assert largest(sides, [result.tensors for result in results]) < 1e-10
    for result, work, noise in zip(results, works, private.randoms, strict=True):
        numbers = sum(value.size for value in work.start.values())
        assert len(noise.drawn[0]) == numbers, "noise is for what is trained, without padding"  # type: ignore[attr-defined]
        expected = alone_under_dp("lora", family, engine, work, private, noise, TRAIN)  # type: ignore[arg-type]
        assert result.error == ""
        assert result.tensors.keys() == work.start.keys()
        assert off(result.tensors, expected) < 1e-10
    assert 0 < results[0].diagnostics["clipped_fraction"] < 1, "rows on both sides of the clip"
    # Planted: another client's fixed tensors.
    turned = [replace(work, fixed=works[(k + 1) % 3].fixed) for k, work in enumerate(works)]
    again = train_pack(engine, turned, {}, TRAIN, private_step(3, noise=0.01, clip=clip))
    assert all(off(one.tensors, two.tensors) > 1e-6 for one, two in zip(results, again, strict=True))


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
def test_a_fixed_factor_of_a_larger_rank(private: bool) -> None:
    """As of FFA-LoRA with ranks by client: what is behind a client's own ranks meets zeros."""
    engine = engine_of("lora", "bert")
    works, cut = [], []
    for work, rank in zip(works_of(engine, "bert", "A"), (1, 2, 2), strict=True):
        start = {name: value[:, :rank] if name.endswith("lora_B") else value for name, value in work.start.items()}
        works.append(replace(work, start=start))
        cut.append({name: value[:rank] for name, value in work.fixed.items()})
    step = private_step(3) if private else None
    results = train_pack(engine, works, {}, TRAIN, step)
    for k, (result, work) in enumerate(zip(results, works, strict=True)):
        own = replace(step, randoms=[private_step(3).randoms[k]]) if step else None
        lone = train_pack(engine, [replace(work, fixed={})], cut[k], TRAIN, own)[0]
        assert off(result.tensors, lone.tensors) < 1e-10


class Coupled(Method):
    """LoRA with the penalty ``0.5 |B A|^2`` of each layer, whose gradient at B depends on A."""

    def __init__(self, method: Method, weight: float = 0.5) -> None:
        self.method, self.weight = method, weight

    def specs(self) -> dict[str, TensorSpec]:
        return self.method.specs()

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        return self.method.factors(tensors)

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor:
        layers = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
        products = [tensors[f"{layer}.lora_B"] @ tensors[f"{layer}.lora_A"] for layer in layers]
        return self.weight * torch.stack([product.square().sum((-2, -1)) for product in products]).sum(0)


def test_a_methods_penalty_sees_a_clients_own_fixed_tensors() -> None:
    plain = engine_of("lora", "bert")
    engine = replace(plain, method=Coupled(plain.method))
    works = works_of(plain, "bert", "A")
    results = train_pack(engine, works, {}, TRAIN)
    expected = [train_pack(engine, [replace(work, fixed={})], work.fixed, TRAIN)[0].tensors for work in works]
    assert largest(results, expected) < 1e-10
    assert largest(train_pack(plain, works, {}, TRAIN), expected) > 1e-3, "control: the penalty moves"
    # By hand, in the only step of a client without rows: B - rate * (decay B + B A A^T).
    pack = Pack(engine, works, {}, SGD)
    groups = torch.tensor([2, 0])
    grads = pack.stack.named(pack.with_penalties(torch.zeros_like(pack.stack.values[groups]), groups))
    for name in factor_of("B", engine):
        for at, k in enumerate((2, 0)):
            b, a = works[k].start[name], works[k].fixed[name.replace("lora_B", "lora_A")]
            assert np.abs(grads[name][at].numpy() - b @ a @ a.T).max() < 1e-12


def test_local_terms_are_of_what_is_trained() -> None:
    """A proximal term, control variates and a gradient of all rows, beside fixed tensors of a client's own."""
    engine = engine_of("lora", "bert")
    for terms in (LocalTerms(proximal=0.5), LocalTerms(scaffold=1), LocalTerms(scaffold=2)):
        works = [
            replace(
                work,
                rows=range(6),
                server_variate={name: np.full_like(value, 0.01) for name, value in work.start.items()},
                own_variate={name: np.full_like(value, 0.02) for name, value in work.start.items()},
            )
            for work in works_of(engine, "bert", "ranks")
        ]
        shared = frozenset(works[0].start)
        results = train_pack(engine, works, {}, SGD, terms=terms, shared=shared)
        for result, work in zip(results, works, strict=True):
            lone = train_pack(engine, [replace(work, fixed={})], work.fixed, SGD, terms=terms, shared=shared)[0]
            assert off(result.tensors, lone.tensors) < 1e-10
            assert not terms.scaffold or off(result.own_variate, lone.own_variate) < 1e-10


def test_what_is_fixed_counts_among_the_copies_of_a_row_under_dp() -> None:
    """Else a pass would hold as many rows as there is memory for what is trained alone."""
    engine = engine_of("lora", "bert")
    works = works_of(engine, "bert", "residual")
    pack = Pack(engine, works, {}, TRAIN, private_step(3))
    assert pack._own_numbers == sum(value.size for value in works[0].fixed.values())
