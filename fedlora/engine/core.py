"""The engine: a resident base model, a method and a task, ready to train packs and to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.layers import GroupedModel, Layout
from fedlora.methods import Method
from fedlora.models import Base
from fedlora.tasks import Examples, Task

Arrays = Mapping[str, NDArray[np.floating]]

# Tokens, padding included, that go through the model at once. It bounds the memory of activations; results
# change by rounding only. A CPU gains nothing from more, a GPU is filled by about this much.
_TOKENS_CPU = 1024
_TOKENS_GPU = 32768


@dataclass(frozen=True)
class Engine:
    """What training and evaluation share.

    Attributes:
        base: The loaded base model.
        method: The low-rank method with its head.
        task: The task.
        grouped: The base model's layers, wrapped.
        dtype: Of the adapter's tensors: float64 with a float64 base, else float32.
        device: Where the base model is.
        tokens: Bound on the tokens of one forward pass.
    """

    base: Base
    method: Method
    task: Task
    grouped: GroupedModel
    dtype: torch.dtype
    device: torch.device
    tokens: int

    @classmethod
    def build(cls, base: Base, method: Method, task: Task) -> Engine:
        """Wrap the layers of ``base`` that ``method`` gives factors for."""
        weight = next(base.model.parameters())
        structure = base.structure
        grouped = GroupedModel(base.model, [layer.name for layer in (*structure.adapted, *structure.head)])
        return cls(
            base=base,
            method=method,
            task=task,
            grouped=grouped,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
            tokens=_TOKENS_GPU if weight.device.type == "cuda" else _TOKENS_CPU,
        )

    def tensor(self, array: NDArray[np.floating]) -> Tensor:
        """Return a copy of ``array`` on the engine's device, in the adapter's dtype."""
        return torch.tensor(array, dtype=self.dtype, device=self.device)

    def micro_batches(self, lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Deal rows of the given lengths out to forward passes: alike in length, within the token bound.

        Yields:
            Positions in ``lengths``; every position once.
        """
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            size = max(1, self.tokens // int(lengths[order[start]]))
            yield order[start : start + size]
            start += size


def evaluate(engine: Engine, tensors: Arrays, examples: Examples, rows: Sequence[int]) -> dict[str, float]:
    """Return the sum over ``rows`` of every metric of the task, and ``examples``: their number.

    Args:
        engine: The engine.
        tensors: All of the method's tensors, without a group axis.
        examples: The rows' source.
        rows: Row numbers to evaluate.
    """
    factors = engine.method.factors({name: engine.tensor(array) for name, array in tensors.items()})
    sums: dict[str, float] = {"examples": float(len(rows))}
    with torch.inference_mode():
        for places in engine.micro_batches(examples.lengths[list(rows)]):
            batch = engine.task.collate(examples, [rows[place] for place in places], engine.device)
            with engine.grouped.placed(factors, Layout(1, len(places), None)) as model:
                for name, values in engine.task.row_metrics(model, batch).items():
                    sums[name] = sums.get(name, 0.0) + float(values.double().sum())
    return sums
