"""The engine: a resident base model, a method and a task, ready to train packs and to evaluate."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.layers import GroupedModel, Layout
from fedlora.engine.stack import common_shapes, pad
from fedlora.engine.work import Arrays
from fedlora.methods import Method
from fedlora.models import Base
from fedlora.tasks import Rows, Task

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
        probed: What :mod:`fedlora.engine.watch` found so far, by what it depends on; ``replace`` starts it anew.
    """

    base: Base
    method: Method
    task: Task
    grouped: GroupedModel
    dtype: torch.dtype
    device: torch.device
    max_cost: int
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

    def micro_batches(self, cost: NDArray[np.int64], copied: int = 0) -> Iterator[NDArray[np.int64]]:
        """Assign rows of the given cost to forward passes: alike in cost, within the bound.

        Args:
            cost: Of each row.
            copied: Trained numbers that each row has a copy of.

        Yields:
            Positions in ``cost``; every position once.
        """
        order = np.argsort(-cost, kind="stable")
        start = 0
        while start < len(order):
            size = max(1, self.max_cost // int(cost[order[start]]))
            size = max(1, min(size, _COPIES // copied)) if copied else size
            yield order[start : start + size]
            start += size


def check_rows_apart(engine: Engine, tensors: Arrays) -> None:
    """Check, on made-up rows, that a row's loss does not depend on the other rows of its batch.

    DP-SGD bounds what one row can change by clipping its gradient. Where losses are coupled (a mean over all tokens of
    the batch, normalisation over the batch) a row also changes the gradients of others, and the bound does not hold.

    Args:
        engine: The engine.
        tensors: All of the method's tensors.

    Raises:
        ValueError: It does.
    """
    made_up = engine.task.made_up_rows()
    values = {name: engine.tensor(value) for name, value in tensors.items()}

    def losses(chosen: list[int]) -> Tensor:
        one = {name: value.unsqueeze(0) for name, value in values.items()}
        layout = Layout.of(torch.zeros(len(chosen), dtype=torch.int64, device=engine.device), 1)
        batch = engine.task.collate(made_up, chosen, engine.device)
        with torch.inference_mode(), engine.grouped.placed(engine.method.factors(one), layout) as model:
            return engine.task.row_losses(model, batch).double()

    together = losses(list(range(len(made_up))))
    alone = torch.cat([losses([row]) for row in range(len(made_up))])
    # Matrix products of other shapes round differently; a coupling changes losses by far more.
    coarse = next(engine.base.model.parameters()).dtype == torch.bfloat16
    if not torch.allclose(together, alone, rtol=5e-2 if coarse else 1e-3, atol=1e-4):
        raise ValueError(
            "privacy.mode = 'dp': a row's loss depends on the other rows of its batch "
            f"({together.tolist()} together, {alone.tolist()} alone), so clipping its gradient does not bound what it "
            "changes. Use a task and a model whose loss is one mean a row, without normalisation over the batch."
        )


def evaluate(
    engine: Engine,
    common: Arrays,
    rows: Rows,
    numbers: Sequence[int],
    *,
    own: Sequence[Arrays] = ({},),
    group: NDArray[np.int64] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Return the task's facts of each row, by name, [n] each.

    Args:
        engine: The engine.
        common: Tensors that all rows are evaluated with, without a group axis.
        rows: The rows, as the task made them.
        numbers: Which of them to evaluate.
        own: For each group (client) the tensors that only its rows are evaluated with; ranks may differ.
        group: For each of ``numbers`` its place in ``own``; None: all belong to the first.
    """
    group = np.zeros(len(numbers), dtype=np.int64) if group is None else group
    fixed = {name: engine.tensor(array) for name, array in common.items()}
    owned = [{name: engine.tensor(array) for name, array in one.items()} for one in own]
    shapes = common_shapes(engine.method.specs(), owned, fixed)
    stacked = {name: torch.stack([pad(one[name], shape) for one in owned]) for name, shape in shapes.items()}
    facts: dict[str, NDArray[np.float64]] = {}
    with torch.inference_mode():
        for chosen in engine.micro_batches(rows.cost[list(numbers)]):
            places = chosen[np.argsort(group[chosen], kind="stable")]
            present, slot = np.unique(group[places], return_inverse=True)
            here = torch.from_numpy(present).to(engine.device)
            factors = engine.method.factors({**fixed, **{name: value[here] for name, value in stacked.items()}})
            layout = Layout.of(torch.from_numpy(slot).to(engine.device), len(present))
            batch = engine.task.collate(rows, [numbers[place] for place in places], engine.device)
            with engine.grouped.placed(factors, layout) as model:
                for name, values in engine.task.row_metrics(model, batch).items():
                    facts.setdefault(name, np.zeros(len(numbers)))[places] = values.double().cpu().numpy()
    return facts
