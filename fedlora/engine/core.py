"""The engine: a resident base model, a method and a task, ready to train packs and to evaluate."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.engine.cards import cards_of, spread
from fedlora.engine.layers import GroupedModel
from fedlora.engine.layout import Layout, Unpadded
from fedlora.engine.schedule import passes
from fedlora.engine.stack import Stack, common_shapes
from fedlora.engine.work import Arrays
from fedlora.methods import Method
from fedlora.models import Base
from fedlora.tasks import Batch, Rows, Task
from fedlora.transfer import to_places

_logger = logging.getLogger(__name__)

FactsOf = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""Computes facts of a batch's rows, [N] each."""

# What goes through the model at once, in units of the rows' cost (tokens, padding included). It bounds the memory of
# activations; results change by rounding only. A CPU gains nothing from more. On a GPU a pass has this many features of
# a layer's input: it then takes a tenth of a second, beside which what the host does for it is little. Layers narrower
# than 1,024 do less for each feature, and the host as much for each layer: they get more, up to four times.
_COST_CPU = 1024
_FEATURES_GPU, _WIDE, _MORE = 2**25, 1024, 4
_COPIES_CPU, _COPIES_GPU = 2**26, 2**30  # trained numbers, where each row has a copy of them (DP-SGD)
_OUTPUTS = 2**30  # and numbers that the model puts out, a logit for each token and word in a language model


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
        compute: In which layers compute with them: the base model's own.
        device: Where the base model is; of one on several GPUs where its inputs are.
        max_cost: Bound on the cost of one forward pass: rows times the cost of the longest.
        batching: Which rows may go through the model together (:mod:`fedlora.engine.apart`).
        kernels: Whether the low-rank kernel computes the adapted layers' updates (:mod:`fedlora.engine.fast`).
        less_memory: Whether the task is the one that :meth:`fedlora.tasks.Task.with_less_memory` gives.
        probed: What :mod:`fedlora.engine.watch` found so far, by what it depends on; ``replace`` starts it anew.
        shortages: The bounds at which memory was short; each halved the next. ``replace`` starts it anew.
    """

    base: Base
    method: Method
    task: Task
    grouped: GroupedModel
    dtype: torch.dtype
    compute: torch.dtype
    device: torch.device
    max_cost: int
    batching: Batching = Batching()
    kernels: bool = False
    less_memory: bool = False
    probed: dict[Hashable, Probed] = field(init=False, repr=False, compare=False, default_factory=dict)
    shortages: list[int] = field(init=False, repr=False, compare=False, default_factory=list)

    @classmethod
    def build(cls, base: Base, method: Method, task: Task) -> Engine:
        """Wrap the layers of ``base`` that ``method`` gives factors for."""
        weight = next(base.model.parameters())
        structure = base.structure
        grouped = GroupedModel(base.model, [layer.name for layer in (*structure.adapted, *structure.head)])
        spread(grouped, {layer.name for layer in structure.head})
        return cls(
            base=base,
            method=method,
            task=task,
            grouped=grouped,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            compute=weight.dtype,
            device=weight.device,
            max_cost=most_cost(base, task),
        )

    @property
    def cards(self) -> tuple[torch.device, ...]:
        """The devices that the base model is on, ``device`` first."""
        return cards_of(self.base.model)

    def tensor(self, array: NDArray[np.floating]) -> Tensor:
        """Return a copy of ``array`` on the engine's device, in the adapter's dtype."""
        return torch.tensor(array, dtype=self.dtype, device=self.device)

    def passes(
        self, cost_n: NDArray[np.int64], group_n: NDArray[np.int64], copied: int = 0, *, padded: bool = False
    ) -> list[NDArray[np.int64]]:
        """Cut rows into forward passes, see :func:`fedlora.engine.schedule.passes`.

        Args:
            cost_n: The cost of each row.
            group_n: Its group.
            copied: Trained numbers that each row has a copy of.
            padded: Whether they go through the model with padding, though its blocks could do without.
        """
        part_n = np.zeros_like(cost_n)
        if self.batching != Batching():
            key = np.stack([cost_n * self.batching.equal_length, group_n * self.batching.one_group])
            _, part_n = np.unique(key, axis=1, return_inverse=True)
        copies = _COPIES_CPU if self.device.type == "cpu" else _COPIES_GPU
        most = max(1, copies // copied) if copied else len(cost_n)
        return passes(cost_n, part_n, self.room, most, padded=padded or not self.grouped.unpadded)

    def halve(self, least: int) -> bool:
        """Halve what goes through the model at once, since memory was short; return False where it is one row already.

        Args:
            least: The cost of a row, below which a pass cannot be cut.
        """
        if self.room <= least:
            return False
        self.shortages.append(self.room)
        return True

    def recover(self) -> None:
        """Give back the memory of what failed for lack of it, once its exception is gone, and say how it goes on."""
        gc.collect()
        torch.cuda.empty_cache()
        how = "blocks are computed twice" if self.grouped.checkpointed else f"passes of at most {self.room} tokens"
        _logger.warning("out of memory on %s; from now on %s", self.device, how)

    @property
    def room(self) -> int:
        """The bound on a pass's cost, after what memory was short for."""
        return self.max_cost >> len(self.shortages)

    def layout(self, group_n: NDArray[np.int64], groups: int, cost_n: NDArray[np.int64] | None) -> Layout:
        """Return the layout of a pass's rows, sorted by group.

        Args:
            group_n: The group of each row.
            groups: Their number.
            cost_n: The tokens of each row; None: rows go through the model with their padding.
        """
        kernel, device = self.kernels, self.device
        unpadded = None
        if cost_n is not None and self.grouped.unpadded:
            unpadded = Unpadded.of(cost_n, group_n, groups, device, kernel=kernel)
        return Layout.of(group_n, groups, device, kernel=kernel, unpadded=unpadded)


def most_cost(base: Base, task: Task) -> int:
    """Return the bound on a pass's cost, as long as memory allows."""
    width = max((layer.d_in for layer in base.structure.adapted), default=1)
    on_cpu = next(base.model.parameters()).device.type == "cpu"
    config: Any = base.model.config
    most = _COST_CPU if on_cpu else int(_FEATURES_GPU / width * min(_MORE, max(1.0, _WIDE / width)))
    return max(1, min(most, _OUTPUTS // task.outputs(config)))


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
        self._fixed = {name: engine.tensor(array).to(engine.compute) for name, array in common.items()}
        shapes = common_shapes(engine.method.specs(), own, common)
        self._stack = Stack(own, shapes, engine.dtype, engine.device)

    def placed(
        self, group: NDArray[np.int64], cost: NDArray[np.int64] | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Put the factors of a batch in place, for the time of a block.

        The model's blocks do not run compiled: a forward pass alone gains little, and would be compiled for itself.

        Args:
            group: Each row's group; rows are sorted by it.
            cost: Its tokens; None: rows go through the model with their padding.
        """
        engine = self._engine
        present, slot_n = np.unique(group, return_inverse=True)
        here = self._stack.values[to_places(present, engine.device)].to(engine.compute)
        factors = engine.method.factors({**self._fixed, **self._stack.named(here)})
        return engine.grouped.placed(factors, engine.layout(slot_n, len(present), cost), compiled=False)


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
    """Return the task's facts of each row, by name, [n] each; where memory is short, in passes of half the size.

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
    tensors, cost = GroupTensors(engine, common, own), rows.cost[list(numbers)]

    def all_passes() -> dict[str, NDArray[np.float64]]:
        found: dict[str, list[Tensor]] = {}
        order: list[NDArray[np.int64]] = []
        for chosen in engine.passes(cost, group):
            places = chosen[np.argsort(group[chosen], kind="stable")]
            batch = engine.task.collate(rows, [numbers[place] for place in places], engine.device)
            with tensors.placed(group[places], cost[places]) as model:
                for name, values in facts_of(model, batch).items():
                    found.setdefault(name, []).append(values.double())
            order.append(places)
        facts = {name: np.zeros(len(numbers)) for name in found}
        for name, parts in found.items():  # not before: fetching a number waits for the device
            facts[name][np.concatenate(order)] = torch.cat(parts).cpu().numpy()
        return facts

    with torch.inference_mode():
        while True:
            try:
                return all_passes()
            except torch.OutOfMemoryError:
                if not engine.halve(int(cost.max(initial=0))):
                    raise
            engine.recover()
