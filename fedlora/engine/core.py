"""The engine: a resident base model, a method and a task, ready to train packs and to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.engine.layers import GroupedModel, Layout
from fedlora.engine.stack import common_shapes, pad
from fedlora.engine.work import Arrays
from fedlora.methods import Method
from fedlora.models import Base
from fedlora.tasks import Batch, Rows, Task

FactsOf = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""Computes facts of a batch's rows, [N] each."""

# What goes through the model at once, in units of the rows' cost (tokens, padding included). It bounds the memory of
# activations; results change by rounding only. A CPU gains nothing from more, a GPU is filled by about this much.
_COST_CPU = 1024
_COST_GPU = 32768
_OUTPUTS = 2**30  # and numbers that the model puts out, a logit for each token and word in a language model
_COPIES = 2**26  # and trained numbers, where each row has a copy of them (DP-SGD)


@final
@dataclass(frozen=True)
class Probed:
    """Which trained tensors passed a probe on rows that are nobody's, see :mod:`fedlora.engine.watch`.

    Attributes:
        connected: Those that a gradient reaches.
        moving: Those of them that an optimizer's step moves.
    """

    connected: frozenset[str]
    moving: frozenset[str]


@final
@dataclass(frozen=True)
class Batching:
    """Which rows may go through the model together, so that each comes out as it does alone.

    Attributes:
        equal_length: Rows of the same length only: what a model makes of padding reaches the row's own numbers.
        one_group: Rows of one group only (a client; under DP a row): the model calls adapted layers on more than rows.
    """

    equal_length: bool = False
    one_group: bool = False

    def __or__(self, other: Batching) -> Batching:
        """Return the restrictions of both."""
        return Batching(self.equal_length or other.equal_length, self.one_group or other.one_group)

    @property
    def words(self) -> str:
        """What is said of it, empty where any rows may go together."""
        return " and ".join(
            text
            for holds, text in (
                (self.equal_length, "rows of equal length only (the model does not keep padding apart)"),
                (self.one_group, "rows of one client only, under DP one by one (the model reads shared inputs, too)"),
            )
            if holds
        )


@final
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
        max_cost: Bound on the cost of one forward pass: rows times the cost of the longest.
        batching: Which rows may go through the model together (:mod:`fedlora.engine.apart`).
        probed: What :mod:`fedlora.engine.watch` found so far, by what it depends on; ``replace`` starts it anew.
    """

    base: Base
    method: Method
    task: Task
    grouped: GroupedModel
    dtype: torch.dtype
    device: torch.device
    max_cost: int
    batching: Batching = Batching()
    probed: dict[Hashable, Probed] = field(init=False, repr=False, compare=False, default_factory=dict)

    @classmethod
    def build(cls, base: Base, method: Method, task: Task) -> Engine:
        """Wrap the layers of ``base`` that ``method`` gives factors for."""
        weight = next(base.model.parameters())
        structure = base.structure
        grouped = GroupedModel(base.model, [layer.name for layer in (*structure.adapted, *structure.head)])
        config: Any = base.model.config
        most = _COST_GPU if weight.device.type == "cuda" else _COST_CPU
        return cls(
            base=base,
            method=method,
            task=task,
            grouped=grouped,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
            max_cost=max(1, min(most, _OUTPUTS // task.outputs(config))),
        )

    def tensor(self, array: NDArray[np.floating]) -> Tensor:
        """Return a copy of ``array`` on the engine's device, in the adapter's dtype."""
        return torch.tensor(array, dtype=self.dtype, device=self.device)

    def micro_batches(
        self, cost: NDArray[np.int64], group: NDArray[np.int64], copied: int = 0
    ) -> Iterator[NDArray[np.int64]]:
        """Assign rows of the given cost to forward passes: alike in cost, within the bound, such as may go together.

        Args:
            cost: Of each row.
            group: Of each row.
            copied: Trained numbers that each row has a copy of.

        Yields:
            Positions in ``cost``; every position once.
        """
        order = np.argsort(-cost, kind="stable")
        for part in self._that_may_meet(order, cost, group):
            start = 0
            while start < len(part):
                size = max(1, self.max_cost // int(cost[part[start]]))
                size = max(1, min(size, _COPIES // copied)) if copied else size
                yield part[start : start + size]
                start += size

    def _that_may_meet(
        self, order: NDArray[np.int64], cost: NDArray[np.int64], group: NDArray[np.int64]
    ) -> list[NDArray[np.int64]]:
        """Return ``order`` in parts whose rows may go through the model together."""
        if self.batching == Batching():
            return [order]
        key = np.stack([cost * self.batching.equal_length, group * self.batching.one_group])
        _, part = np.unique(key, axis=1, return_inverse=True)
        return [order[part[order] == number] for number in range(int(part.max(initial=-1)) + 1)]


@final
class GroupTensors:
    """The tensors of several groups on the engine's device, from which those of a batch's rows are taken.

    Args:
        engine: The engine.
        common: Tensors that all rows have in common, without a group axis.
        own: For each group (client) the tensors that only its rows have; ranks may differ.
    """

    def __init__(self, engine: Engine, common: Arrays, own: Sequence[Arrays]) -> None:
        self._engine = engine
        self._fixed = {name: engine.tensor(array) for name, array in common.items()}
        owned = [{name: engine.tensor(array) for name, array in one.items()} for one in own]
        shapes = common_shapes(engine.method.specs(), owned, self._fixed)
        self._stacked = {name: torch.stack([pad(one[name], shape) for one in owned]) for name, shape in shapes.items()}

    def placed(self, group: NDArray[np.int64]) -> AbstractContextManager[nn.Module]:
        """Put the factors of a batch in place, for the time of a block, whose rows are of these groups."""
        engine = self._engine
        present, slot = np.unique(group, return_inverse=True)
        here = torch.from_numpy(present).to(engine.device)
        factors = engine.method.factors({**self._fixed, **{name: value[here] for name, value in self._stacked.items()}})
        return engine.grouped.placed(factors, Layout.of(torch.from_numpy(slot).to(engine.device), len(present)))


def evaluate(
    engine: Engine,
    common: Arrays,
    rows: Rows,
    numbers: Sequence[int],
    *,
    own: Sequence[Arrays] = ({},),
    group: NDArray[np.int64] | None = None,
    facts_of: FactsOf | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the task's facts of each row, by name, [n] each.

    Args:
        engine: The engine.
        common: Tensors that all rows are evaluated with, without a group axis.
        rows: The rows, as the task made them.
        numbers: Which of them to evaluate.
        own: For each group (client) the tensors that only its rows are evaluated with; ranks may differ.
        group: For each of ``numbers`` its place in ``own``; None: all belong to the first.
        facts_of: Returns other facts of a batch's rows; None: the task's metrics of rows.
    """
    facts_of = facts_of or engine.task.row_metrics
    group = np.zeros(len(numbers), dtype=np.int64) if group is None else group
    tensors = GroupTensors(engine, common, own)
    facts: dict[str, NDArray[np.float64]] = {}
    with torch.inference_mode():
        for chosen in engine.micro_batches(rows.cost[list(numbers)], group):
            places = chosen[np.argsort(group[chosen], kind="stable")]
            batch = engine.task.collate(rows, [numbers[place] for place in places], engine.device)
            with tensors.placed(group[places]) as model:
                for name, values in facts_of(model, batch).items():
                    facts.setdefault(name, np.zeros(len(numbers)))[places] = values.double().cpu().numpy()
    return facts
