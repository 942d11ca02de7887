"""An adapter that does not train is an error: bugs are planted, each must be caught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine import ClientWork, Engine, optimizers, train_pack
from fedlora.engine import pack as pack_module
from fedlora.engine.pack import Pack
from fedlora.engine.watch import Watch, negligible
from fedlora.methods import Factor, Head
from fedlora.methods.base import Method
from fedlora.transfer import to_places
from tests.support.matrix import Changed
from tests.test_packing import make_engine, make_works

TRAIN = TrainConfig(learning_rate=0.01)


def detached(method: Method, *sides: str) -> Method:
    """The method with these sides of its low-rank factors cut off from the loss."""
    return Changed(method, lambda one: one._replace(**{side: getattr(one, side).detach() for side in sides}))


def works_of(engine: Engine, steps: int) -> list[ClientWork]:
    return [replace(w, batches=[w.batches[0]] * steps) for w in make_works(engine, 5, TRAIN) if w.batches][:3]


@pytest.mark.parametrize("steps", [1, 3])
def test_sound_training_passes(steps: int) -> None:
    engine = make_engine("bert")
    assert [r.error for r in train_pack(engine, works_of(engine, steps), {}, TRAIN)] == ["", "", ""]


@pytest.mark.parametrize("steps", [1, 3])
def test_detached_adapter(steps: int) -> None:
    """The head learns, the loss falls, the adapter is not connected."""
    engine = make_engine("bert")
    planted = replace(engine, method=detached(engine.method, "A", "B"))
    errors = [r.error for r in train_pack(planted, works_of(engine, steps), {}, TRAIN)]
    assert all("lora_A never had a gradient" in error for error in errors)


def test_detached_adapter_with_a_frozen_head() -> None:
    """Nothing at all is connected: not torch's error, ours."""
    engine = make_engine("bert")
    planted = replace(engine, method=detached(engine.method, "A", "B"))
    specs = engine.method.specs()
    works = works_of(engine, 2)
    common = {n: v for n, v in works[0].start.items() if specs[n].kind == "head"}
    works = [replace(w, start={n: v for n, v in w.start.items() if n not in common}) for w in works]
    assert all("never had a gradient" in r.error for r in train_pack(planted, works, common, TRAIN))


@pytest.mark.parametrize("side", ["A", "B"])
def test_one_side_detached(side: str) -> None:
    """A frozen B leaves A without a gradient, too; a detached A shows once B has moved."""
    engine = make_engine("bert")
    planted = replace(engine, method=detached(engine.method, side))
    errors = [r.error for r in train_pack(planted, works_of(engine, 3), {}, TRAIN)]
    assert all("never had a gradient in 3 steps" in error for error in errors)


def test_b_frozen_at_zero_by_its_role() -> None:
    """Roles can kill all gradients: B fixed at zero, A trained."""
    engine = make_engine("bert")
    works = works_of(engine, 3)
    frozen = {n: v for n, v in works[0].start.items() if n.endswith("lora_B")}
    works = [replace(w, start={n: v for n, v in w.start.items() if n not in frozen}) for w in works]
    assert all("lora_A never had a gradient" in r.error for r in train_pack(engine, works, frozen, TRAIN))


def test_only_the_client_that_starts_at_zero_is_stuck() -> None:
    """A and B at zero: no gradient can ever come. B alone, as ever: A's comes after the first step.."""
    engine = make_engine("bert")
    first, *_ = works_of(engine, 1)
    sound = {n: np.zeros_like(v) if n.endswith("lora_B") else v for n, v in first.start.items()}
    stuck = {n: np.zeros_like(v) if n.endswith("lora_A") else v for n, v in sound.items()}
    works = [replace(first, client=g, start=start) for g, start in enumerate([stuck, sound, stuck, dict(sound)])]
    errors = [r.error for r in train_pack(engine, works, {}, TRAIN)]
    assert ["lora_A never had a gradient in 1 steps" in error for error in errors] == [True, False, True, False]
    assert errors[1] == errors[3] == ""


def test_a_gradient_that_was_once_there_was_seen() -> None:
    """A tensor whose gradient ends, as of a gate that closes, is trained all the same; the peak of all steps counts."""
    engine = make_engine("bert")
    works = works_of(engine, 2)
    pack = Pack(engine, works, {}, TRAIN)
    watch = Watch(pack.stack)
    first, second = pack.turns
    grads = pack.backward(first)
    watch.observe(grads, to_places(first.groups, engine.device))
    before = watch.seen(negligible(engine))
    watch.observe(torch.zeros_like(grads), to_places(second.groups, engine.device))
    assert watch.seen(negligible(engine)) == before
    assert all(before)


def test_stale_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer holds copies made before the tensors went into the layers: gradients come, nothing moves."""
    build = optimizers.build_optimizer

    def stale(values: Tensor, *rest: Any) -> Any:
        return build(values.detach().clone(), *rest)

    monkeypatch.setattr(pack_module, "build_optimizer", stale)
    engine = make_engine("bert")
    errors = [r.error for r in train_pack(engine, works_of(engine, 3), {}, TRAIN)]
    assert all("has a gradient but did not move" in error for error in errors)


def test_learning_rate_that_rounding_swallows() -> None:
    engine = make_engine("bert")
    config = TrainConfig(optimizer="sgd", learning_rate=1e-300)
    errors = [r.error for r in train_pack(engine, works_of(engine, 3), {}, config)]
    assert all("train.learning-rate is too small" in error for error in errors)


def test_head_that_is_not_used() -> None:
    """A layer of the head whose output goes nowhere is noticed by name."""
    engine = make_engine("bert")

    class Unused(Head):  # type: ignore[misc]
        def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
            factors = super().factors(tensors)
            dense = factors["classifier"]
            factors["classifier"] = dense._replace(weight=torch.zeros_like(dense[0]) + dense[0].detach())
            return factors

    method = engine.method
    assert isinstance(method, Head)
    planted = replace(engine, method=Unused(method.method, method.layers))
    errors = [r.error for r in train_pack(planted, works_of(engine, 2), {}, TRAIN)]
    assert all("classifier.weight never had a gradient" in error for error in errors)
