"""The trained tensors of a pack as one matrix: a row of numbers for each client.

Optimizers, clipping and checks are then a few operations on [G, P] whatever the number of tensors, and a client's joint
norm is the norm of a row. `G` groups (clients of a pack), `P` trained numbers of a client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor


@final
class Stack:
    """Trained tensors with a leading group axis, and their gradients.

    Args:
        starts: For each group its tensors, all with the same names and shapes.

    Attributes:
        values: The numbers [G, P], a leaf of autograd.
        grads: Their gradients [G, P]; every backward pass adds to them.
        places: Where in a row each tensor is, by name.
    """

    def __init__(self, starts: Sequence[Mapping[str, Tensor]]) -> None:
        rows = [torch.cat([value.flatten() for value in start.values()]) for start in starts]
        self.values = torch.stack(rows).requires_grad_()
        self.grads = torch.zeros_like(self.values)
        self.values.grad = self.grads
        self.places: dict[str, slice] = {}
        self._shapes = {name: value.shape for name, value in starts[0].items()}
        at = 0
        for name, shape in self._shapes.items():
            self.places[name] = slice(at, at + shape.numel())
            at += shape.numel()

    def tensors(self, groups: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors by name, [G, ...], of all groups or of those numbered in ``groups``."""
        return self.named(self.values if groups is None else self.values[groups])

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Return rows of numbers [n, P] as tensors by name, [n, ...]."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        parts = rows.split(sizes, 1)  # type: ignore[no-untyped-call]
        return {
            name: part.view(len(rows), *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def spread(self, numbers: Mapping[str, float]) -> Tensor:
        """Return a row [P] that has for each tensor its number in ``numbers``, everywhere, and zero without one."""
        row = torch.zeros_like(self.grads[0])
        for name, number in numbers.items():
            row[self.places[name]] = number
        return row
