"""The trained tensors of a pack as one matrix: a row of numbers for each client.

Optimizers, clipping and checks are then a few operations on rows of [G, P] whatever the number of tensors, and a
client's joint norm is the norm of a row. `G` groups (clients of a pack), `P` trained numbers of a client.

Clients may hold tensors of smaller ranks than others. In the pack these are followed by zeros, up to the common shape;
a mask says which numbers are real, and what comes out has the client's own shapes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.work import Arrays
from fedlora.methods import TensorSpec
from fedlora.transfer import to_device

Shape = tuple[int, ...]


@final
class Stack:
    """Trained tensors with a leading group axis.

    Args:
        starts: For each group its tensors, all with the same names.
        shapes: The shapes in the pack, by name.
        dtype: Of the numbers.
        device: Where they are.
        last: Names of tensors that come last in a row.

    Attributes:
        values: The numbers [G, P].
        places: Where in a row each tensor is, by name.
        real: Which numbers are a client's own and not padding, bool [G, P]; None: all are.
    """

    def __init__(
        self,
        starts: Sequence[Arrays],
        shapes: Mapping[str, Shape],
        dtype: torch.dtype,
        device: torch.device,
        last: Set[str] = frozenset(),
    ) -> None:
        self._own = [{name: value.shape for name, value in start.items()} for start in starts]
        self.shapes = {name: tuple(shapes[name]) for name in sorted(starts[0], key=last.__contains__)}
        self.places: dict[str, slice] = {}
        at = 0
        for name, shape in self.shapes.items():
            self.places[name] = slice(at, at + int(np.prod(shape)))
            at = self.places[name].stop
        self._dtype, self._device, self._size = dtype, device, at
        self.values = self.rows(starts)
        self.real: Tensor | None = None
        if any(own != self.shapes for own in self._own):
            ones = {shape: np.ones(shape) for own in self._own for shape in own.values()}  # each of them is sent once
            self.real = self.rows([{name: ones[shape] for name, shape in own.items()} for own in self._own]) != 0

    def named(self, rows: Tensor, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return rows of numbers as tensors by name, [n, ...].

        Args:
            rows: Numbers [n, P], or [n, p] of the tensors named.
            names: Tensors that stand one after another; None: all.
        """
        shapes = {name: self.shapes[name] for name in (self.shapes if names is None else names)}
        parts = rows.split([int(np.prod(shape)) for shape in shapes.values()], 1)  # type: ignore[no-untyped-call]
        return {
            name: part.unflatten(1, shape) if shape else part[:, 0]
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def rows(self, tensors: Sequence[Arrays]) -> Tensor:
        """Return tensors of each group as rows of numbers [G, P], padded with zeros; a tensor that lacks is zero.

        Groups that have the very same arrays, as all do that start a round from the server's, are sent to the device
        once.
        """
        distinct: dict[tuple[tuple[str, int], ...], int] = {}
        keys = [tuple((name, id(value)) for name, value in one.items()) for one in tensors]
        row_g = [distinct.setdefault(key, len(distinct)) for key in keys]
        host = torch.zeros((len(distinct), self._size), dtype=self._dtype, pin_memory=self._device.type != "cpu")
        numbers = host.numpy()
        for row, one in dict(zip(row_g, tensors, strict=True)).items():
            for name, value in one.items():
                numbers[row, self.places[name]] = pad(value, self.shapes[name]).ravel()
        sent = host.to(self._device, non_blocking=True)
        return sent if len(distinct) == len(tensors) else sent[to_device(np.array(row_g), self._device)]

    def split(self, rows: Tensor) -> list[dict[str, NDArray[np.floating]]]:
        """Return rows of numbers [G, P] as each group's arrays by name, at its own shapes."""
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.device.type != "cpu")
        host.copy_(rows)  # kept by the arrays, which are views of it
        named = {name: value.numpy() for name, value in self.named(host).items()}
        return [
            {
                name: named[name][g] if shape == self.shapes[name] else _first(named[name][g], shape)
                for name, shape in own.items()
            }
            for g, own in enumerate(self._own)
        ]

    def spread(self, numbers: Mapping[str, float]) -> Tensor:
        """Return a row [P] that has for each tensor its number in ``numbers``, everywhere, and zero without one."""
        row = torch.zeros_like(self.values[0])
        for name, number in numbers.items():
            row[self.places[name]] = number
        return row


def _first(value: NDArray[np.floating], shape: Shape) -> NDArray[np.floating]:
    """Return an array without what :func:`pad` put behind it."""
    return np.ascontiguousarray(value[tuple(slice(size) for size in shape)])


def pad(value: NDArray[np.floating], shape: Shape) -> NDArray[np.floating]:
    """Return an array with zeros behind it along each axis, up to ``shape``."""
    missing = [(0, whole - n) for whole, n in zip(shape, value.shape, strict=True)]
    return np.pad(value, missing) if any(n for _, n in missing) else value


def common_shapes(specs: Mapping[str, TensorSpec], tensors: Sequence[Arrays], fixed: Arrays) -> dict[str, Shape]:
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

    return {name: shape_of(name, value.shape) for name, value in tensors[0].items()}
