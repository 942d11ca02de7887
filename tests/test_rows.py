"""The engine is independent of texts: a task on frames, with a model that is no transformer, trains in packs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self, final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import Batching, ClientWork, Engine, evaluate, find_batching, train_pack
from fedlora.methods import Layer, build_method
from fedlora.models import Base, Structure
from fedlora.tasks import Batch, Measure, Task
from tests.support.matrix import random_start
from tests.test_dp_step import private_step

FEATURES = 6


@dataclass(frozen=True)
class Recordings:
    """Frames of each row, [T, d], and what they sum up to."""

    frames: tuple[NDArray[np.float64], ...]
    targets: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def cost(self) -> NDArray[np.int64]:
        return np.array([len(row) for row in self.frames], dtype=np.int64)


class Model(nn.Module):
    """Two layers on each frame, and the mean over a row's frames."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.first, self.second = nn.Linear(FEATURES, 10), nn.Linear(10, 1)

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        out = self.second(torch.tanh(self.first(frames)))[..., 0]
        return (out * mask).sum(1) / mask.sum(1)


@final
class Regression(Task):
    """Predicts a number from frames; its rows hold no tokens, and it pads with zeros."""

    auto_model, peft_type, has_head = "", "", False
    measure = Measure("loss", higher_is_better=False)
    metric_names = ("loss",)

    @classmethod
    def build(cls, tokenizer: Any, config: Config) -> Self:
        return cls()

    def encode(self, table: Any, tokenizer: Any, max_length: int) -> Recordings:
        raise AssertionError("its rows are made up here, never read from a table")

    def made_up_rows(self, *, long: bool = False) -> Recordings:
        return recordings(3, seed=99)

    def join(self, parts: Sequence[tuple[Recordings, int]]) -> Recordings:
        return Recordings(tuple(one.frames[n] for one, n in parts), np.array([one.targets[n] for one, n in parts]))

    def collate(self, rows: Recordings, numbers: Sequence[int], device: torch.device) -> Batch:
        longest = max(len(rows.frames[n]) for n in numbers)
        frames, mask = np.zeros((len(numbers), longest, FEATURES)), np.zeros((len(numbers), longest))
        for place, n in enumerate(numbers):
            frames[place, : len(rows.frames[n])], mask[place, : len(rows.frames[n])] = rows.frames[n], 1.0
        arrays = {"frames": frames, "mask": mask, "targets": rows.targets[list(numbers)]}
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        off: Tensor = model(batch["frames"], batch["mask"]) - batch["targets"]
        return off.square()

    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.row_losses(model, batch)}

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        return dict(means)


def recordings(rows: int, seed: int) -> Recordings:
    generator = np.random.default_rng(seed)
    frames = tuple(generator.standard_normal((int(n), FEATURES)) for n in generator.integers(1, 8, size=rows))
    return Recordings(frames, generator.standard_normal(rows))


@pytest.fixture
def engine() -> Engine:
    torch.manual_seed(0)
    model = Model().double().requires_grad_(False)
    layers = (Layer("first", FEATURES, 10, True, False), Layer("second", 10, 1, True, False))
    structure = Structure(family="frames", adapted=layers, head=(), num_parameters=0)
    method = build_method(Config(method=MethodConfig("lora", rank=2)), layers, ())
    return Engine.build(Base(model, None, structure, ""), method, Regression())


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
def test_a_pack_on_frames(engine: Engine, private: bool) -> None:
    start = random_start(engine)
    batches = [[np.array([0, 2]), np.array([1])], [np.array([3, 1, 0])]]
    works = [ClientWork(k, recordings(4, k), 4, own, start) for k, own in enumerate(batches)]
    train = TrainConfig(learning_rate=0.05)
    together = train_pack(engine, works, {}, train, private_step(2) if private else None)
    for k, (result, work) in enumerate(zip(together, works, strict=True)):
        assert result.error == ""
        step = private_step(2) if private else None
        if step:
            step = type(step)(step.mechanism, [step.randoms[k]])
        alone = train_pack(engine, [work], {}, train, step)[0]
        assert max(float(np.abs(result.tensors[n] - alone.tensors[n]).max()) for n in start) < 1e-10
        assert max(float(np.abs(result.tensors[n] - start[n]).max()) for n in start) > 1e-3
    assert find_batching(engine, start) == Batching()
    losses = evaluate(engine, start, works[0].examples, range(4))["loss"]
    assert losses.shape == (4,)
