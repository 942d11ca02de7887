"""Bugs that published code has: each that can be planted here is, and is caught.

The numbers are those of a list of fourteen, made by reading the code of FedEx-LoRA, Fed-SB, FLoRA, FlexLoRA, LA-LoRA,
DP-FedLoRA, FedSVD, FedASK, FlyLoRA and MoS. Those of messages and servers are in ``test_known_bugs_server.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clients.worker import Worker
from fedlora.config import ConfigError, TrainConfig
from fedlora.engine import Engine, train_pack
from fedlora.methods import (
    Factor,
    Head,
    Layer,
    LowRank,
    Method,
    Mos,
    MosOptions,
    S2Lora,
    TensorSpec,
    build_method,
    check_start,
    initial_tensors,
)
from fedlora.privacy import Entry, Mechanism, PrivateRandom, default_delta, epsilon, least_noise_multiplier
from fedlora.privacy.step import PrivateStep, clip_factors
from fedlora.runs.privacy import client_record
from fedlora.seeded import Seeded
from simulations.privacy import participations
from simulations.session import check_trainers
from tests.support.federation import seeded_of, updates
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, HEAD, Arrays, Changed, alone, engine_of, random_start, works
from tests.support.trainers import InProcess, dp_config, tiny_worker


class SameForAll(Seeded):
    """Bug 1: the seed is set again before each layer, so layers of one shape start alike (Fed-SB)."""

    def uniform(self, *key: Any, shape: tuple[int, ...], bound: float) -> Any:
        return super().uniform("init", shape=shape, bound=bound)


@pytest.mark.parametrize("method", ["lora", "s2-lora", "mos"])
def test_1_layers_start_apart_and_clients_alike(method: str) -> None:
    layers = [replace(layer, name=f"{layer.name}.{n}") for n, layer in enumerate([LAYERS[0]] * 3)]
    specs = build_method(CONFIGS[method], layers if method == "lora" else LAYERS, HEAD).specs()

    def distinct(seeded: Seeded) -> bool:
        drawn = [value for value in initial_tensors(specs, seeded).values() if value.any()]
        pairs = [(a, b) for n, a in enumerate(drawn) for b in drawn[:n] if a.shape == b.shape]
        return not any(np.array_equal(a, b) for a, b in pairs)

    assert distinct(Seeded(3))
    one, two = (initial_tensors(specs, Seeded(3)) for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one), "every client starts with the same tensors"
    if method == "lora":
        assert not distinct(SameForAll(3)), "the planted bug is seen"


def transposed(method: Method) -> Method:
    """Bug 3: Delta W goes in the wrong way round; square layers take it without a word (FedEx-LoRA)."""
    return Changed(method, lambda one: LowRank(one.B.mT, one.A.mT, one.scale))


TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)


def off_from_the_formula(engine: Engine, method: str = "lora") -> float:
    start = random_start(engine)
    work = works(start, "bert")[0]
    result = train_pack(engine, [work], {}, TRAIN)[0]
    expected = alone(method, "bert", engine, work, {}, TRAIN)
    return max(float(np.abs(result.tensors[n] - expected[n]).max()) for n in expected)


def test_3_orientation() -> None:
    engine = engine_of("lora", "bert")
    planted = replace(engine, method=transposed(engine.method))
    assert all(layer.d_in == layer.d_out for layer in engine.base.structure.adapted)
    assert off_from_the_formula(engine) < 1e-10
    assert off_from_the_formula(planted) > 1e-3
    wide = engine_of("lora", "bert", "intermediate.dense")
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|[Ee]xpected size"):
        off_from_the_formula(replace(wide, method=transposed(wide.method)))


def test_6_the_scale_of_an_update() -> None:
    """alpha / r left out when an update leaves the method (FedLLM-Factory): Delta W is not the formula's."""
    engine = engine_of("lora", "bert")
    tensors = random_start(engine)
    head = engine.method
    assert isinstance(head, Head)
    planted = Head(build_method(CONFIGS["lora"], engine.base.structure.adapted, []), head.layers)
    planted.method.method.scale = 1.0  # type: ignore[attr-defined]
    right, wrong = updates("lora", tensors, engine.method), updates("lora", tensors, planted)
    for layer in engine.base.structure.adapted:
        formula = 6.0 / 3 * tensors[f"{layer.name}.lora_B"] @ tensors[f"{layer.name}.lora_A"]
        assert np.abs(right[layer.name] - formula).max() < 1e-12
        assert np.abs(wrong[layer.name] - formula).max() > 1e-2


def test_7_delta_below_one_over_batches(tmp_path: Path) -> None:
    """Fed-SB takes delta below one over the number of *batches*, which is far above one over the rows."""
    config = dp_config(tmp_path, **{"privacy.delta": 0.0})
    size, batch = config.privacy.client_size, config.train.batch_size
    planted = 0.5 * batch / size
    assert default_delta(size) <= 0.1 / size < planted
    with pytest.raises(ConfigError, match=rf"privacy.delta = {planted:g}: must be below 1 / {size}"):
        dp_config(tmp_path, **{"privacy.delta": planted})


def test_8_one_round_sold_as_all(tmp_path: Path) -> None:
    """FedSVD logs the epsilon of one round, others that of expected participation: noise is for the worst client."""
    changes = {"privacy.epsilon": 2.0, "privacy.noise-multiplier": 0.0, "rounds": 12, "federation.clients-per-round": 2}
    config = dp_config(tmp_path, **changes)
    mechanism, delta = Mechanism.of(config), config.privacy.delta
    counts = participations(config)[-1]
    assert int(counts.max()) > 6, "more than the expected half of the rounds"
    assert epsilon([mechanism.use(int(counts.max()))], target_delta=delta) <= 2.0
    planted = least_noise_multiplier(  # by expected participation
        target_epsilon=2.0, target_delta=delta, sample_rate=mechanism.sample_rate, steps=6 * mechanism.steps
    )
    assert epsilon([mechanism.use(int(counts.max()))._replace(noise_multiplier=planted)], target_delta=delta) > 2.0
    one_round = epsilon([mechanism.use()], target_delta=delta)
    record = client_record(config, 0, [Entry(n, mechanism.use(), "") for n in range(1, 7)])
    assert record["epsilon"] > 1.2 * one_round
    assert record["ledger"] == [mechanism.use(6)._asdict()]


def test_9_a_threshold_that_depends_on_the_batch() -> None:
    """LA-LoRA clips to a norm taken from the batch itself: one row then changes what others may contribute."""
    grads = torch.tensor([[1.0, 0.0], [1.0, 0.0], [10.0, 0.0], [10.0, 0.0], [90.0, 0.0]], dtype=torch.float64)

    def change(clip: Callable[[torch.Tensor], float]) -> float:
        with_it, without = (clip_factors(part.norm(dim=1), clip(part)) @ part for part in (grads, grads[:-1]))
        return float((with_it - without).norm())

    assert change(lambda part: 10.0) <= 10.0
    planted = change(lambda part: float(part.norm(dim=1).median()))
    assert planted > 2 * 10.0, "more than twice the larger threshold"


def test_10_parameters_clipped_in_place_of_updates(tmp_path: Path) -> None:
    """DP-FedLoRA clips what it sends tensor by tensor: here one clip holds the gradient of all tensors of a row."""
    engine = engine_of("lora", "bert")
    start = {name: 10.0 * value for name, value in random_start(engine).items()}  # far above any clip
    work = [replace(works(start, "bert")[0], batches=[np.array([0])])]
    mechanism = Mechanism(0.0, 0.01, sample_rate=1.0, expected_batch_size=1, steps=1)
    train = TrainConfig(optimizer="sgd", learning_rate=1.0)
    result = train_pack(engine, work, {}, train, PrivateStep(mechanism, [PrivateRandom()]))[0]
    moved = [np.linalg.norm(result.tensors[name] - start[name]) for name in start]
    assert np.linalg.norm(moved) == pytest.approx(0.01, rel=1e-3), "the update, of all tensors together"
    assert sum(norm > 0 for norm in moved) > 5
    assert all(np.abs(result.tensors[name] - start[name]).max() <= 0.01 for name in start), "tensors are not scaled"


def test_11_a_start_that_depends_on_data(tmp_path: Path) -> None:
    """Bases made from a client's gradients (Fed-SB) give away what they came from: such a trainer is refused."""
    honest, other = tiny_worker(tmp_path / "one"), tiny_worker(tmp_path / "two")
    assert check_trainers(InProcess([honest, other]), honest.loaded.model.config).specs
    planted = next(name for name, value in other.loaded.model.initial.items() if value.any())
    other.loaded.model.initial[planted][:] += float(other.loaded.model.examples["train"].cost.mean())
    with pytest.raises(ValueError, match="do not draw the same seeded tensors or indices"):
        check_trainers(InProcess([honest, other]), honest.loaded.model.config)


class TwoZeros(Method):
    """Bug 13: B of S2-LoRA starts at zero, and so does s: no gradient ever comes."""

    def __init__(self, method: Method, bound: float, kind: str) -> None:
        self.method, self.bound, self.kind = method, bound, kind

    def specs(self) -> dict[str, TensorSpec]:
        specs = self.method.specs()
        return {n: replace(s, bound=self.bound) if s.kind == self.kind else s for n, s in specs.items()}

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        return self.method.factors(tensors)


def test_13_exactly_one_factor_is_zero_at_the_start() -> None:
    """Caught when a method is built; and if it were not, when it trains."""
    config = CONFIGS["s2-lora"]
    sound = build_method(config, LAYERS, HEAD)
    check_start(sound.specs())
    two_zeros, none = TwoZeros(sound, 0.0, "B"), TwoZeros(sound, 0.5, "s")
    for planted in (two_zeros, none):
        with pytest.raises(AssertionError, match="one must start at zero"):
            check_start(planted.specs())
    assert all(np.all(update == 0) for update in updates("s2-lora", seeded_of("s2-lora"), sound).values())
    started = updates("s2-lora", initial_tensors(none.specs(), Seeded(0)), none)
    assert all(np.any(update) for update in started.values()), "the planted one does not start as its base"
    engine = engine_of("s2-lora", "bert")
    dead = TwoZeros(engine.method, 0.0, "B")
    start = initial_tensors(dead.specs(), Seeded(0))
    result = train_pack(replace(engine, method=dead), works(start, "bert"), {}, TRAIN)[0]
    assert "never had a gradient" in result.error


def test_14_shards_of_another_seed(tmp_path: Path) -> None:
    """MoS indices drawn from another seed on one machine: the pools fit, and mean something else there."""
    honest = tiny_worker(tmp_path / "one", **{"strategy.name": "mos"})
    other = tiny_worker(tmp_path / "two", **{"strategy.name": "mos"})
    assert check_trainers(InProcess([honest, other]), honest.loaded.model.config).specs
    planted = tiny_worker(tmp_path / "three", **{"strategy.name": "mos"})
    engine = planted.loaded.model.engine
    structure = engine.base.structure
    shuffled = build_method(replace(planted.loaded.model.config, seed=9), structure.adapted, structure.head)
    model = replace(planted.loaded.model, engine=replace(engine, method=shuffled))
    planted._loaded = replace(planted.loaded, model=model)
    assert isinstance(planted, Worker)
    assert planted.describe().initial_digest == honest.describe().initial_digest, "no tensor shows it"
    with pytest.raises(ValueError, match="do not draw the same seeded tensors or indices"):
        check_trainers(InProcess([honest, planted]), honest.loaded.model.config)


def test_14_fan_in_and_scale_of_short_shards() -> None:
    """Kaiming by the length of a shard, or a scale by the budget, are not the formula: test_mos.py holds both."""
    layers = [Layer(f"m.{n}.q", 24, 36, bias=True, fan_in_fan_out=False) for n in range(6)]
    options = MosOptions(budget=2, shards=4, private=1)
    method = Mos(layers, rank=6, alpha=12.0, config=options, seeded=Seeded(0))
    name = "m.*.q.mos_A"
    planted = replace(method.specs()[name], bound=1 / np.sqrt(method.specs()[name].shape[1]))
    drawn = initial_tensors({name: planted}, Seeded(0))[name]
    assert np.abs(drawn).max() > 1.5 / np.sqrt(24), "the planted start is twice as wide"
    assert np.abs(initial_tensors(method.specs(), Seeded(0))[name]).max() <= 1 / np.sqrt(24)
    engine = engine_of("mos", "bert")
    assert isinstance(engine.method, Head)
    assert off_from_the_formula(engine, "mos") < 1e-10
    engine.method.method.scale = 6.0 / CONFIGS["mos"].options(MosOptions).budget  # type: ignore[attr-defined]
    assert off_from_the_formula(engine, "mos") > 1e-3, "the planted scale, by the budget instead of the active rank"


def test_s2_needs_no_more_than_its_formula() -> None:
    """Control for 13: the smallest S2-LoRA trains."""
    method = S2Lora([LAYERS[0]], rank=1, alpha=1.0, sparsity=0.0, orthogonality=0.0)
    tensors: Arrays = initial_tensors(method.specs(), Seeded(0))
    named = {name: torch.from_numpy(value).requires_grad_() for name, value in tensors.items()}
    factor = method.factors(named)[LAYERS[0].name]
    assert isinstance(factor, LowRank)
    (factor.scaled_b() @ factor.A).sum().backward()  # type: ignore[no-untyped-call]
    grads = {name.rsplit(".", 1)[1]: value.grad for name, value in named.items()}
    assert grads["s"] is not None
    assert float(grads["s"].abs().sum()) > 0
    assert grads["A"] is None or not grads["A"].any()
