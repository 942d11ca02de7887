"""The trained tensors of a pack as one matrix: a row of numbers for each client.

Optimizers, clipping and checks are then a few operations on rows of [G, P] whatever the number of tensors, and a
client's joint norm is the norm of a row. `G` groups (clients of a pack), `P` trained numbers of a client.

Clients may hold tensors of smaller ranks than others. In the pack these are followed by zeros, up to the common shape;
a mask says which numbers are real, and what comes out has the client's own shapes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.work import Arrays
from fedlora.methods import TensorSpec
from fedlora.transfer import to_device, wait

Shape = tuple[int, ...]


@final
class _Part(NamedTuple):
    """What tensors of some shapes take of a row.

    Attributes:
        shapes: The tensors' shapes, by name in the order of a row.
        places: Where each of them is, side by side [p].
        whole: Whether they are all of a row.
    """

    shapes: dict[str, Shape]
    places: list[slice]
    whole: bool

    def views(self, rows: NDArray[np.floating]) -> list[dict[str, NDArray[np.floating]]]:
        """Return the tensors of each row by name, as views of its numbers side by side, [n, p]."""
        pairs = zip(self.shapes.items(), self.places, strict=True)
        named: list[dict[str, NDArray[np.floating]]] = [{} for _ in rows]
        for (name, shape), place in pairs:
            for tensors, numbers in zip(named, rows[:, place], strict=True):
                tensors[name] = numbers.reshape(shape)
        return named


@final
class Started(NamedTuple):
    """The numbers that groups start with.

    Attributes:
        rows: Those of groups with other numbers, [D, P].
        row_g: Each group's row, int64 [G].
    """

    rows: Tensor
    row_g: Tensor


@final
class Stack:
    """Trained tensors with a leading group axis.

    Args:
        starts: For each group its tensors, all with the same names.
        shapes: The shapes in the pack, by name.
        dtype: Of the numbers.
        device: Where they are.
        last: Names of tensors that come last in a row.
        remembered: Whether :meth:`started` will be asked.

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
        *,
        remembered: bool = False,
    ) -> None:
        self.shapes = {name: tuple(shapes[name]) for name in sorted(starts[0], key=last.__contains__)}
        self.places = dict(zip(self.shapes, _side_by_side(self.shapes), strict=True))
        self._dtype, self._device = dtype, device
        self._size = sum(int(np.prod(shape)) for shape in self.shapes.values())
        self._parts: dict[tuple[tuple[str, Shape], ...], _Part] = {}
        each, row_g = _distinct(starts)
        parts = [self._part(one) for one in each]
        self._part_g = [parts[row] for row in row_g.tolist()]
        sent = self._sent(each)
        here = to_device(row_g, device)
        self.values = sent if len(each) == len(starts) else sent[here]
        self._started = Started(sent.clone() if self.values is sent else sent, here) if remembered else None
        self.real: Tensor | None = None
        if not all(part.whole for part in self._part_g):
            self.real = torch.zeros_like(self.values, dtype=torch.bool)
            for part, groups in _alike(self._part_g):
                self._put(self.real, groups, part, torch.ones_like(self.real[: len(groups), : part.places[-1].stop]))

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
        each, row_g = _distinct(tensors)
        rows = self._sent(each)
        return rows if len(each) == len(tensors) else rows[to_device(row_g, self._device)]

    def _sent(self, each: Sequence[Arrays]) -> Tensor:
        """Return groups' tensors as rows of numbers on the device."""
        sent: Tensor | None = None
        for part, places in _alike([self._part(one) for one in each]):
            host = self._host(len(places), part)
            for views, place in zip(part.views(host.numpy()), places.tolist(), strict=True):
                for name, view in views.items():
                    view[...] = each[place][name]
            here = host.to(self._device, non_blocking=True)
            if part.whole and len(places) == len(each):
                sent = here
                break
            if sent is None:
                sent = torch.zeros((len(each), self._size), dtype=self._dtype, device=self._device)
            self._put(sent, places, part, here)
        assert sent is not None, "rows of nobody"
        return sent

    @property
    def started(self) -> Started:
        """The numbers that groups started with, once for all that started from the very same arrays."""
        assert self._started is not None, "a stack that does not remember its start"
        return self._started

    def split(self, rows: Tensor) -> list[dict[str, NDArray[np.floating]]]:
        """Return rows of numbers [G, P] as each group's arrays by name, at its own shapes."""
        split: list[dict[str, NDArray[np.floating]]] = [{} for _ in self._part_g]
        for part, groups in _alike(self._part_g):
            host = self._host(len(groups), part)
            chosen = rows if part.whole and len(groups) == len(split) else self._chosen(rows, groups, part)
            host.copy_(chosen, non_blocking=self._device.type == "cuda")
            for views, group in zip(part.views(host.numpy()), groups.tolist(), strict=True):
                split[group] = views
        wait(self._device)
        return split

    def _part(self, tensors: Arrays) -> _Part:
        """Return what these tensors take of a row: made once for all of the same shapes."""
        assert tensors.keys() <= self.shapes.keys(), "tensors that a row has no place for"
        shapes = {name: tensors[name].shape for name in self.shapes if name in tensors}
        key = tuple(shapes.items())
        if key not in self._parts:
            self._parts[key] = _Part(shapes, _side_by_side(shapes), shapes == self.shapes)
        return self._parts[key]

    def _put(self, rows: Tensor, places: NDArray[np.int64], part: _Part, numbers: Tensor) -> None:
        """Write a part's numbers [n, p] into rows at some places, [n]."""
        here, named = to_device(places, self._device), self.named(rows)
        for (name, shape), at in zip(part.shapes.items(), part.places, strict=True):
            index: tuple[Tensor | slice, ...] = (here, *(slice(n) for n in shape))
            named[name][index] = numbers[:, at].reshape(len(numbers), *shape)

    def _chosen(self, rows: Tensor, places: NDArray[np.int64], part: _Part) -> Tensor:
        """Return a part's numbers [n, p] of rows at some places, [n]."""
        chosen = rows[to_device(places, self._device)]
        if part.whole:
            return chosen
        named = self.named(chosen)
        firsts = [named[name][:, *(slice(n) for n in shape)] for name, shape in part.shapes.items()]
        return torch.cat([first.reshape(len(places), -1) for first in firsts], 1)

    def _host(self, rows: int, part: _Part) -> Tensor:
        """Return room on the host for rows of a part's numbers, in memory that a GPU copies from and to by itself."""
        size = part.places[-1].stop if part.places else 0
        return torch.empty((rows, size), dtype=self._dtype, pin_memory=self._device.type != "cpu")

    def spread(self, numbers: Mapping[str, float]) -> Tensor:
        """Return a row [P] that has for each tensor its number in ``numbers``, everywhere, and zero without one."""
        row = torch.zeros_like(self.values[0])
        for name, number in numbers.items():
            row[self.places[name]] = number
        return row


def _side_by_side(shapes: Mapping[str, Shape]) -> list[slice]:
    """Return where tensors of these shapes are, one after another."""
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()], dtype=int).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _alike(parts: Sequence[_Part]) -> list[tuple[_Part, NDArray[np.int64]]]:
    """Return the different parts, each with the places at which it stands."""
    found: dict[int, list[int]] = {}
    for place, part in enumerate(parts):
        found.setdefault(id(part), []).append(place)
    return [(parts[places[0]], np.array(places)) for places in found.values()]


def _distinct(tensors: Sequence[Arrays]) -> tuple[list[Arrays], NDArray[np.int64]]:
    """Return the groups' tensors, those of the very same arrays once, and for each group its place among them, [G]."""
    place_of: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
    each: list[Arrays] = []
    place_g = np.empty(len(tensors), dtype=np.int64)
    for group, one in enumerate(tensors):
        place = place_of.setdefault((tuple(one), tuple(map(id, one.values()))), len(each))
        if place == len(each):
            each.append(one)
        place_g[group] = place
    return each, place_g


def _shapes(tensors: Sequence[Arrays]) -> list[dict[str, Shape]]:
    """Return the shapes that groups' tensors have, by name: those of groups with the same ones once."""
    each = _distinct(tensors)[0]
    return [dict(one) for one in {tuple((name, value.shape) for name, value in one.items()) for one in each}]


def common_shapes(specs: Mapping[str, TensorSpec], tensors: Sequence[Arrays], *fixed: Arrays) -> dict[str, Shape]:
    """Return the shapes that clients' tensors have in one pack: at the largest rank among them and ``fixed``.

    Args:
        specs: The method's tensors.
        tensors: For each client its tensors, all with the same names.
        fixed: The tensors that they are used with.
    """
    axes = {name: spec.rank_axis for name, spec in specs.items() if spec.rank_axis is not None}
    own, others = _shapes(tensors), _shapes(fixed)
    ranks = [shape[axes[name]] for one in (*own, *others) for name, shape in one.items() if name in axes]

    def shape_of(name: str) -> Shape:
        sizes = zip(*{one[name] for one in own}, strict=True)  # of what is no method's, each axis may grow
        return tuple(max(ranks if axis == axes.get(name) else size) for axis, size in enumerate(sizes))

    return {name: shape_of(name) for name in tensors[0]}
