"""The engine: a resident base model, a method and a task, ready to train packs and to evaluate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
_LOGITS = 2**30  # and logits of a language model, one for each token and word


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
        tokens = _TOKENS_GPU if weight.device.type == "cuda" else _TOKENS_CPU
        if not task.has_head:
            config: Any = base.model.config
            tokens = max(1, min(tokens, _LOGITS // int(config.vocab_size)))
        return cls(
            base=base,
            method=method,
            task=task,
            grouped=grouped,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
            tokens=tokens,
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


def evaluate(
    engine: Engine,
    common: Arrays,
    examples: Examples,
    rows: Sequence[int],
    *,
    own: Sequence[Arrays] = ({},),
    group: NDArray[np.int64] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return what the task tells of each row, by name, [rows] each.

    Args:
        engine: The engine.
        common: Tensors that all rows are evaluated with, without a group axis.
        examples: The rows' source.
        rows: Row numbers to evaluate.
        own: For each group (client) the tensors that only its rows are evaluated with.
        group: For each of ``rows`` its place in ``own``; None: all belong to the first.
    """
    group = np.zeros(len(rows), dtype=np.int64) if group is None else group
    fixed = {name: engine.tensor(array) for name, array in common.items()}
    stacked = {name: torch.stack([engine.tensor(one[name]) for one in own]) for name in own[0]}
    told: dict[str, NDArray[np.float64]] = {}
    with torch.inference_mode():
        for chosen in engine.micro_batches(examples.lengths[list(rows)]):
            places = chosen[np.argsort(group[chosen], kind="stable")]
            present, slot = np.unique(group[places], return_inverse=True)
            here = torch.from_numpy(present).to(engine.device)
            factors = engine.method.factors({**fixed, **{name: value[here] for name, value in stacked.items()}})
            layout = Layout.of(torch.from_numpy(slot).to(engine.device), len(present))
            batch = engine.task.collate(examples, [rows[place] for place in places], engine.device)
            with engine.grouped.placed(factors, layout) as model:
                for name, values in engine.task.row_metrics(model, batch).items():
                    told.setdefault(name, np.zeros(len(rows)))[places] = values.double().cpu().numpy()
    return told
