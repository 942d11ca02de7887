"""The same engine on a GPU: checked against the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientResult, ClientWork, Engine, train_pack
from fedlora.methods import build_method, count_parameters, initial_tensors
from fedlora.models import prepare_base
from fedlora.privacy import PrivateRandom
from fedlora.seeded import Seeded
from fedlora.workload import pack_bytes
from tests.support.families import random_examples, small_model, small_task, task_of, without_float32
from tests.support.matrix import CONFIGS, random_start
from tests.test_dp_step import TRAIN, off, private_step, ragged
from tests.test_packing import ADAMW, make_works

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


FAMILIES = pytest.mark.parametrize("family", ["bert", "llama-lm"])
# transformers computes rotary positions in float32 whatever the model's dtype, and sines differ by device.
TOLERANCE = {"bert": 1e-10, "llama-lm": 1e-6}


METHODS = pytest.mark.parametrize("method", CONFIGS)


def trained(method: str, family: str, device: str, dtype: torch.dtype) -> list[ClientResult]:
    model: Any = without_float32(small_model(family)).to(dtype)
    has_head = task_of(family).has_head
    base = prepare_base(model, None, "auto", has_head=has_head, device=torch.device(device))
    built = build_method(CONFIGS[method], base.structure.adapted, base.structure.head)
    engine = Engine.build(base, built, small_task(family))
    works = [replace(work, start=random_start(engine)) for work in make_works(engine, 6, ADAMW, family=family)]
    return train_pack(engine, works, {}, ADAMW)


@METHODS
@FAMILIES
def test_float64_on_the_gpu_equals_the_cpu(method: str, family: str) -> None:
    cpu, cuda = (trained(method, family, device, torch.float64) for device in ("cpu", "cuda"))
    for one, two in zip(cpu, cuda, strict=True):
        assert two.error == ""
        difference = max(float(np.abs(one.tensors[name] - two.tensors[name]).max()) for name in one.tensors)
        # Ranks that few tokens use have gradients near AdamW's epsilon, which makes much of their rounding.
        assert difference < (1e-3 if method == "flylora" else TOLERANCE[family])


@METHODS
@FAMILIES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_losses_in_lower_precision(method: str, family: str, dtype: torch.dtype, tolerance: float) -> None:
    exact, coarse = trained(method, family, "cpu", torch.float64), trained(method, family, "cuda", dtype)
    for one, two in zip(exact, coarse, strict=True):
        assert two.error == ""
        assert two.loss == pytest.approx(one.loss, rel=tolerance)


@METHODS
def test_equal_packs_give_equal_bits(method: str) -> None:
    """MoS adds up the gradients of shards that many layers use, in a fixed order."""
    one, two = (trained(method, "bert", "cuda", torch.float32) for _ in range(2))
    for first, second in zip(one, two, strict=True):
        assert all(np.array_equal(first.tensors[name], second.tensors[name]) for name in first.tensors)


@METHODS
@FAMILIES
def test_dp_steps_on_the_gpu_equal_the_cpu(method: str, family: str) -> None:
    """Float64, with the same noise: ragged batches, an empty client and a step that is empty for all."""
    results = []
    for device in ("cpu", "cuda"):
        model: Any = without_float32(small_model(family))
        has_head = task_of(family).has_head
        base = prepare_base(model, None, "auto", has_head=has_head, device=torch.device(device))
        built = build_method(CONFIGS[method], base.structure.adapted, base.structure.head)
        engine = Engine.build(base, built, small_task(family))
        results.append(train_pack(engine, ragged(random_start(engine), family), {}, TRAIN, private_step(3)))
    for one, two in zip(*results, strict=True):
        assert two.error == ""
        assert off(one.tensors, two.tensors) < TOLERANCE[family]
        assert one.diagnostics["rows"] == two.diagnostics["rows"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_client_takes_the_memory_that_packs_are_sized_by(optimizer: str) -> None:
    """The most that a pack has of a client, with all of them in one turn, from packs of two sizes."""
    train = TrainConfig(optimizer=optimizer, learning_rate=0.01)
    model: Any = small_model("bert", hidden_size=256, intermediate_size=256).to(torch.float32)
    base = prepare_base(model, None, "all-linear", device=torch.device("cuda"))
    method = build_method(Config(method=MethodConfig("lora", rank=64)), base.structure.adapted, base.structure.head)
    engine = Engine.build(base, method, small_task("bert"))
    start, rows = initial_tensors(method.specs(), Seeded(0), "float32"), random_examples(2, seed=0)
    taken = []
    for clients in (16, 16, 64):  # the first makes what stays
        works = [ClientWork(client, rows, 2, [np.arange(1)] * 2, start) for client in range(clients)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_pack(replace(engine, max_cost=2**20), works, {}, train)
        taken.append(torch.cuda.max_memory_allocated() - before)
    client = (taken[2] - taken[1]) / 48
    predicted = pack_bytes(count_parameters(method.specs()), Config(train=train))
    assert 0.6 * predicted < client < 1.1 * predicted


def test_noise_of_the_gpu() -> None:
    """Philox, keyed by the client's own operating system: standard normal, and no client's is another's."""
    like = torch.zeros(200_000, device="cuda")
    drawn = [PrivateRandom().normal(like) for _ in range(2)]
    again = PrivateRandom.reproducible(3, 0, 1), PrivateRandom.reproducible(3, 0, 1)
    for one in drawn:
        assert one.device.type == "cuda"
        assert abs(float((one**2).mean()) - 1) < 6 * (2 / len(like)) ** 0.5
        assert abs(float(one.mean())) < 6 / len(like) ** 0.5
    assert abs(float((drawn[0] * drawn[1]).mean())) < 6 / len(like) ** 0.5
    assert torch.equal(again[0].normal(like), again[1].normal(like))
