"""The trained tensors of a pack as one matrix: a row of numbers for each client.

Optimizers, clipping and checks are then a few operations on [G, P] whatever the number of tensors, and a client's joint
norm is the norm of a row. `G` groups (clients of a pack), `P` trained numbers of a client.

Clients may hold tensors of smaller ranks than others. In the pack these are followed by zeros, up to the common shape;
a mask says which numbers are real, and what comes out has the client's own shapes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedlora.methods import TensorSpec

Shape = tuple[int, ...]


@final
class Stack:
    """Trained tensors with a leading group axis, and their gradients.

    Args:
        starts: For each group its tensors, all with the same names.
        shapes: The shapes in the pack, by name; None: those of the first group.

    Attributes:
        values: The numbers [G, P], a leaf of autograd.
        grads: Their gradients [G, P]; every backward pass adds to them.
        places: Where in a row each tensor is, by name.
        real: Which numbers are a client's own and not padding, bool [G, P]; None: all are.
    """

    def __init__(self, starts: Sequence[Mapping[str, Tensor]], shapes: Mapping[str, Shape] | None = None) -> None:
        self._own = [{name: tuple(value.shape) for name, value in start.items()} for start in starts]
        self._shapes = {name: tuple((shapes or self._own[0])[name]) for name in starts[0]}
        self.places: dict[str, slice] = {}
        at = 0
        for name, shape in self._shapes.items():
            self.places[name] = slice(at, at + int(np.prod(shape)))
            at = self.places[name].stop
        self.values = self.rows(starts).requires_grad_()
        self.grads = torch.zeros_like(self.values)
        self.values.grad = self.grads
        ragged = any(own != self._shapes for own in self._own)
        whole = [{name: torch.ones_like(value, dtype=torch.bool) for name, value in start.items()} for start in starts]
        self.real = self.rows(whole) if ragged else None

    def tensors(self, groups: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors by name, [G, ...], of all groups or of those numbered in ``groups``."""
        return self.named(self.values if groups is None else self.values[groups])

    def named(self, rows: Tensor) -> dict[str, Tensor]:
        """Return rows of numbers [n, P] as tensors by name, [n, ...]."""
        sizes = [place.stop - place.start for place in self.places.values()]
        parts = rows.split(sizes, 1)  # type: ignore[no-untyped-call]
        return {
            name: part.view(len(rows), *shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def rows(self, tensors: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return tensors of each group as rows of numbers [G, P], padded with zeros; a tensor that lacks is zero."""
        return torch.stack([torch.cat([self._flat(name, one.get(name)) for name in self._shapes]) for one in tensors])

    def _flat(self, name: str, value: Tensor | None) -> Tensor:
        shape = self._shapes[name]
        return self.grads.new_zeros(int(np.prod(shape))) if value is None else pad(value, shape).flatten()

    def split(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """Return rows of numbers [G, P] as each group's tensors by name, at its own shapes."""
        named = self.named(rows)
        return [{name: _first(named[name][g], shape) for name, shape in own.items()} for g, own in enumerate(self._own)]

    def spread(self, numbers: Mapping[str, float]) -> Tensor:
        """Return a row [P] that has for each tensor its number in ``numbers``, everywhere, and zero without one."""
        row = torch.zeros_like(self.grads[0])
        for name, number in numbers.items():
            row[self.places[name]] = number
        return row


def _first(value: Tensor, shape: Shape) -> Tensor:
    """Return a tensor without what :func:`pad` put behind it."""
    return value[tuple(slice(size) for size in shape)]


def pad(value: Tensor, shape: Shape) -> Tensor:
    """Return a tensor with zeros behind it along each axis, up to ``shape``."""
    if value.shape == shape:
        return value
    missing = [whole - n for whole, n in zip(shape, value.shape, strict=True)]
    return functional.pad(value, [n for size in reversed(missing) for n in (0, size)])


def common_shapes(
    specs: Mapping[str, TensorSpec], tensors: Sequence[Mapping[str, Tensor]], fixed: Mapping[str, Tensor]
) -> dict[str, Shape]:
    """Return the shapes that clients' tensors have in one pack: at the largest rank among them and ``fixed``.

    Args:
        specs: The method's tensors.
        tensors: For each client its tensors, all with the same names.
        fixed: The tensors that they are used with.
    """
    axes = {name: spec.rank_axis for name, spec in specs.items() if spec.rank_axis is not None}
    ranks = [value.shape[axes[name]] for one in (*tensors, fixed) for name, value in one.items() if name in axes]

    def shape_of(name: str, shape: Shape) -> Shape:
        return tuple(max(ranks) if axis == axes.get(name) else size for axis, size in enumerate(shape))

    return {name: shape_of(name, tuple(value.shape)) for name, value in tensors[0].items()}
