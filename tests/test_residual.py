"""A residual beside each layer's A and B: as if it were in the base's weights, which stay as they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora.config import TrainConfig
from fedlora.engine import Engine, evaluate, train_pack
from fedlora.engine.layers import Layout
from fedlora.methods import LowRank, build_method
from fedlora.methods.residual import compress, residual_specs
from fedlora.models import prepare_base
from fedlora.runs.export import adapter_files
from fedlora.runs.ranks import FILE
from tests.support.families import random_examples, small_model, small_task, task_of, without_float32
from tests.support.matrix import CONFIGS, MODELS, Arrays, engine_of, random_start, works
from tests.test_dp_step import private_step

TRAIN = TrainConfig(learning_rate=0.02, weight_decay=0.1)
SCALE = CONFIGS["lora"].method.alpha / CONFIGS["lora"].method.rank
families = pytest.mark.parametrize("family", MODELS)


def residual_of(engine: Engine, rank: int = 4, seed: int = 5) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        name: 0.2 * generator.standard_normal(spec.shape)
        for name, spec in residual_specs(engine.method.specs(), [rank] * len(engine.base.structure.adapted)).items()
    }


def merged(family: str, residual: Arrays) -> Engine:
    """Return an engine whose base has the residual in its weights, as the paper merges it."""
    model = without_float32(small_model(family))
    for layer in engine_of("lora", family).base.structure.adapted:
        update = torch.from_numpy(SCALE * residual[f"{layer.name}.residual_B"] @ residual[f"{layer.name}.residual_A"])
        weight = model.get_submodule(layer.name).weight
        weight.data += update.T if layer.fan_in_fan_out else update
    base = prepare_base(model, None, "auto", has_head=task_of(family).has_head, device=torch.device("cpu"))
    built = build_method(CONFIGS["lora"], base.structure.adapted, base.structure.head)
    return Engine.build(base, built, small_task(family))


def off(one: Any, other: Any) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
@families
def test_training_beside_a_residual(family: str, private: bool) -> None:
    """A pack on the untouched base equals one on a base with the residual merged in."""
    engine = engine_of("lora", family)
    residual, start = residual_of(engine), random_start(engine)
    pack = works(start, family)
    beside = train_pack(engine, pack, residual, TRAIN, private_step(3) if private else None)
    inside = train_pack(merged(family, residual), pack, {}, TRAIN, private_step(3) if private else None)
    without = train_pack(engine, pack, {}, TRAIN, private_step(3) if private else None)
    for one, two in zip(beside, inside, strict=True):
        assert one.error == two.error == ""
        assert one.tensors.keys() == start.keys(), "the residual does not train"
        assert off(one.tensors, two.tensors) < 1e-10
    assert off(beside[0].tensors, without[0].tensors) > 1e-5, "control: it makes a difference"


@families
def test_evaluation_beside_a_residual(family: str) -> None:
    """Common to all rows, also where clients have tensors of their own."""
    engine = engine_of("lora", family)
    residual, start, examples = residual_of(engine), random_start(engine), random_examples(9, 3, family=family)
    own = [{name: (1 + k) * value for name, value in start.items()} for k in range(3)]
    beside = evaluate(engine, residual, examples, range(9), own=own, group=np.arange(9) % 3)
    inside = evaluate(merged(family, residual), {}, examples, range(9), own=own, group=np.arange(9) % 3)
    assert np.abs(beside["loss"] - inside["loss"]).max() < 1e-10


def outputs(model: Any, family: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    batch = small_task(family).collate(random_examples(6, seed=2, family=family), range(6), torch.device("cpu"))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@pytest.mark.parametrize("stacked", [2, 40], ids=["few", "more than features"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@families
def test_peft_reproduces_the_engine(
    family: str, dtype: torch.dtype, bound: float, stacked: int, tmp_path: Path
) -> None:
    """Exported, the residual is a part of A and B, of the least rank that holds both."""
    engine = engine_of("lora", family)
    tensors = {**random_start(engine), **residual_of(engine, stacked)}
    files = adapter_files(engine, tensors, CONFIGS["lora"])
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    factors = engine.method.factors({name: engine.tensor(value) for name, value in tensors.items()})
    with engine.grouped.placed(factors, Layout(1, 6, None)) as model:
        expected = outputs(model, family)
    plain = without_float32(small_model(family)).to(dtype)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path)).to(dtype).eval()
    largest = float(expected.abs().max())
    assert float((outputs(loaded, family) - expected).abs().max()) < bound * largest
    strengths = json.loads(files[FILE])
    for layer in engine.base.structure.adapted:
        assert len(strengths[layer.name]) == min(3 + stacked, layer.d_in, layer.d_out)
        factor = factors[layer.name]
        assert isinstance(factor, LowRank)
        assert factor.residual is not None
        update = factor.scaled_b() @ factor.A + factor.residual.scaled_b() @ factor.residual.A
        values = torch.linalg.svdvals(update)[: len(strengths[layer.name])]
        assert np.allclose(strengths[layer.name], values), "singular values of the whole update"


def test_a_layer_without_a_residual_is_as_it_was() -> None:
    engine = engine_of("lora", "bert")
    start = {name: torch.from_numpy(value) for name, value in random_start(engine).items()}
    for factor in engine.method.factors(start).values():
        assert not isinstance(factor, LowRank) or factor.residual is None


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("rank", [1, 5])
def test_compression_finds_the_rank(rank: int, dtype: str) -> None:
    """Of 12 stacked ranks that are sums of a few: what is left is those, and the product stays."""
    generator = np.random.default_rng(0)
    mix = generator.standard_normal((12, rank))
    a = (mix @ generator.standard_normal((rank, 30))).astype(dtype)
    b = (generator.standard_normal((20, rank)) @ mix.T).astype(dtype)
    small_a, small_b = compress(a, b)
    assert small_a.shape == (rank, 30)
    assert small_b.shape == (20, rank)
    product = b.astype(float) @ a.astype(float)
    rounding = {"float64": 1e-11, "float32": 1e-5}[dtype]
    assert np.abs(small_b @ small_a - product).max() < rounding * np.abs(product).max()
    assert np.allclose(np.linalg.norm(small_a, axis=1), np.linalg.norm(small_b, axis=0)), "in equal shares"


def test_compression_keeps_what_is_small_and_real() -> None:
    a, b = np.diag([1.0, 1e-9]), np.eye(2)
    small_a, small_b = compress(a, b)
    assert math.isclose((small_b @ small_a)[1, 1], 1e-9, rel_tol=1e-6)
    assert compress(np.zeros((3, 4)), np.zeros((5, 3)))[0].shape == (1, 4), "PEFT has no rank of zero"
